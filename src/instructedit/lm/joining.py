"""Joining a prompt and its answer into one text: what belongs between the two, and a chat model's template."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from instructedit.errors import UserError

#: Scripts written without spaces between words, as the Unicode names of their characters begin.
SPACELESS = (
    "CJK ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "IDEOGRAPHIC ", "FULLWIDTH ", "HALFWIDTH KATAKANA", "THAI ", "LAO ",
    "KHMER ", "MYANMAR ", "TIBETAN ", "YI ", "JAVANESE ", "BALINESE ", "TAI ", "NEW TAI LUE ",
)  # fmt: skip
#: Quotes that look the same whether they open or close.
_QUOTES = "\"'`"


def joiner(prompt: str, answer: str) -> str:
    """Returns what belongs between a prompt and its answer: a space, or nothing.

    Nothing belongs after white space, after an opening bracket or quote (a straight quote opens at the start, after
    white space and after an opening bracket or curved quote), in scripts written without spaces (after one, or before
    one if the prompt holds such a script too), and before a closing mark (``,``, ``;``, ``:``, ``!``, ``?``, a closing
    bracket or curved quote). A full stop is no such mark: ".NET" and ".5" are words.
    """
    last, first = prompt[-1:], answer[:1]
    if not last or last.isspace() or _opens(prompt) or _spaceless(last):
        return ""
    if first in ",;:!?" or unicodedata.category(first) in ("Pe", "Pf"):
        return ""
    return "" if _spaceless(first) and any(map(_spaceless, prompt)) else " "


def _opens(prompt: str) -> bool:
    """True if a prompt ends in an opening bracket or quote."""
    last = prompt[-1]
    if last in _QUOTES:
        before = prompt[-2:-1]
        return not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi")
    return unicodedata.category(last) in ("Ps", "Pi")


@lru_cache(10_000)
def _spaceless(character: str) -> bool:
    """True if a character belongs to a script written without spaces."""
    return "\u3000" <= character <= "\u303f" or unicodedata.name(character, "").startswith(SPACELESS)


class Turn(NamedTuple):
    """The parts of a chat template around one request of a user, up to the model's answer.

    Attributes:
        before: Text in front of the user's words.
        after: Text between them and the answer.
        joiner: White space that the template itself puts between the opening of the model's turn and the model's words.
    """

    before: str
    after: str
    joiner: str


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Splits a tokenizer's own chat template into its parts.

    Raises:
        UserError: If it has none, or it cannot render one request of a user.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"chat: the tokenizer of {name} has no chat template; leave out chat")
    user, answer = "\ue000", "\ue001"  # no template holds these
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    try:
        asked = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates may raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"chat: the chat template of {name} fails: {type(error).__name__}: {reason}") from error
    if asked.count(user) != 1:
        raise UserError(f"chat: the chat template of {name} does not show what the user says once")
    before, after = asked.split(user)
    try:
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template that cannot show an answer needs nothing in front of it
        whole = ""
    between = whole[len(asked) : whole.find(answer)] if whole.startswith(asked) else ""
    return Turn(before, after, between if between.isspace() else "")
