"""Tokenisation of prompts and answers, in one place for editing, scoring, generating and reading alike."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from instructedit.errors import UserError
from instructedit.lm.joining import Turn, chat_turn, joiner
from instructedit.lm.tokens import TokenBatch
from instructedit.records import stripped

_CUT = "some prompts are longer than the model's context or max_length and lose their beginning"
#: Texts after which others are tokenised as continuations: the first one that shares no token with them is used.
_ANCHORS = ("\n", ".", "|")


class _Tokens(NamedTuple):
    """Token ids and the characters that each covers; a special token that a tokenizer adds covers (0, 0)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class Text:
    """The tokenisation of prompts and answers into rows.

    A row consists of its opening (``<s>`` if the tokenizer prepends it, or a chat template's beginning), the prompt and
    the answer. Tokens that a tokenizer appends to a prompt or an answer are left out. The prompt has the same tokens
    with an answer as without. A prompt loses stray spaces (see `records.stripped`), an answer all that surround it.

    Attributes:
        tokenizer: Tokenizer of the LM; must provide character offsets (every fast tokenizer does).
        max_length: Maximum number of tokens in a row. A longer one loses the beginning of its prompt, not its opening.
        joiner: Text between a prompt and its answer; ``auto`` is a space or nothing (see `joining.joiner`).
        chat: Put the prompt into the user's turn of the tokenizer's own chat template, the answer into the model's.
        ends: Let `encode` append the token that ends a text to each answer.

    Raises:
        UserError: With `chat`, if there is no template that takes a request; with `ends`, if no token ends a text.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    joiner: str = "auto"
    chat: bool = False
    ends: bool = False

    def __post_init__(self) -> None:
        _ = self._turn
        if self.ends and self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no token that ends a text, for answers to end with")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest that tells tokenizers apart by their vocabulary (sha256, hex)."""
        words = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    @functools.cached_property
    def exact_fingerprint(self) -> str:
        """Digest that tells tokenizers apart by all that decides a text's tokens (sha256, hex)."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def within(self, max_length: int | None) -> Self:
        """Returns a copy for rows of at most `max_length` tokens (and no more than before)."""
        return replace(self, max_length=min(max_length or self.max_length, self.max_length))

    def ended(self, ends: bool = True) -> Self:
        """Returns a copy in which the token that ends a text is an answer's last one, or is not."""
        return self if self.ends == ends else replace(self, ends=ends)

    @functools.cached_property
    def _turn(self) -> Turn | None:
        return chat_turn(self.tokenizer) if self.chat else None

    @functools.cached_property
    def opening(self) -> list[int]:
        """Tokens that open every row."""
        if self._turn is not None:
            return self.token_ids(self._turn.before)
        first = self.tokenizer.bos_token_id
        return [first] if first is not None and self._tokenised(["a"])[0].ids[:1] == [first] else []

    def breaks(self, token: int) -> bool:
        """True if a token ends a line."""
        if token not in self._breaks:
            self._breaks[token] = "\n" in self.tokenizer.decode([token])
        return self._breaks[token]

    @functools.cached_property
    def _breaks(self) -> dict[int, bool]:
        return {}

    def token_ids(self, text: str) -> list[int]:
        """Returns the token ids of text within a row, without special tokens around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def document(self, text: str) -> list[int]:
        """Returns all token ids of plain text without an answer; no chat template is put around it."""
        plain = replace(self, chat=False) if self.chat else self
        return plain._tokenised([text])[0].ids

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns all token ids of prompts to continue; an empty prompt becomes a row's opening, if there is one."""
        texts = [self._before_answer(prompt) for prompt in prompts]
        return [tokens.ids or self.opening for tokens in self._tokenised(texts)]

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Counts the tokens of each prompt with its answer, before any truncation."""
        return [len(tokens.ids) for tokens, *_ in self._answered(pairs)]

    def joined(self, prompt: str, answer: str) -> str:
        """Joins a prompt and its answer as plain text."""
        prompt, answer = stripped(prompt), answer.strip()
        return prompt + (joiner(prompt, answer) if self.joiner == "auto" else self.joiner) + answer

    def encode(self, pairs: Sequence[tuple[str, str]], where: Sequence[str] = (), scored: bool = False) -> TokenBatch:
        """Tokenises prompts with their answers; the answers' tokens become labels.

        Args:
            pairs: (prompt, answer).
            where: A name for each pair, for messages.
            scored: Leave out of the labels a lone space token in front of an answer ("▁", "7"): a model must learn to
                predict it, but predicting it shows no knowledge of the answer.

        Raises:
            UserError: If an answer leaves no room for a single prompt token, or yields no token.
        """
        rows: list[tuple[list[int], int]] = []
        truncated = 0
        end = [self.tokenizer.eos_token_id] if self.ends else []
        answered = self._answered(pairs, scored)
        for i, (tokens, size, _) in enumerate(answered):
            ids, budget = tokens.ids + end, self.max_length - len(self._kept(tokens.ids))
            if not 0 < size < min(len(tokens.ids), budget - len(end)):
                name = where[i] if where else repr(pairs[i][0][-60:])
                raise UserError(
                    f"{name}: the answer {pairs[i][1][:40]!r} has {size} tokens, which leaves nothing of its prompt "
                    f"within max_length={self.max_length}"
                )
            truncated += len(ids) > self.max_length
            rows.append((self._cut(ids, self.max_length), size + len(end)))
        if truncated:
            warnings.warn(f"{_CUT} (counted in data/truncated)", stacklevel=2)
        batch = TokenBatch.of(rows, truncated)
        if scored:
            batch.unscored = torch.tensor([unscored for *_, unscored in answered])
        return batch

    def positions(self, pairs: Sequence[tuple[str, str]], ends: Sequence[int], batch: TokenBatch) -> Tensor:
        """Finds for each row of a batch the last token of a span of its prompt, [rows].

        Args:
            pairs: The (prompt, answer) pairs from which `encode` made the batch.
            ends: Where in each prompt the span ends, in characters.
            batch: The rows.
        """
        found = []
        for (tokens, *_), (prompt, _), end, size in zip(self._answered(pairs), pairs, ends, batch.lengths, strict=True):
            end += (len(self._turn.before) if self._turn else 0) - (len(prompt) - len(prompt.lstrip()))
            places = [t for t, (start, stop) in enumerate(tokens.offsets) if start < end and stop > start]
            cut = len(tokens.ids) + self.ends - size
            kept = len(self._kept(tokens.ids)) if cut else 0
            found.append(max(kept, max(places, default=0) - cut))
        return torch.tensor(found, device=batch.device)

    def shortened(self, prompts: Sequence[list[int]], max_length: int) -> list[list[int]]:
        """Shortens prompts to at most `max_length` tokens; a longer one loses its beginning, but not its opening."""
        if max(map(len, prompts)) > max_length:
            warnings.warn(_CUT, stacklevel=2)
        return [self._cut(ids, max_length) for ids in prompts]

    def _cut(self, ids: list[int], budget: int) -> list[int]:
        if len(ids) <= budget:
            return ids
        kept = self._kept(ids)[: max(0, budget - 1)]
        return kept + ids[len(ids) - (budget - len(kept)) :]

    def _kept(self, ids: list[int]) -> list[int]:
        """Returns the opening if a row starts with it, else nothing."""
        return self.opening if self.opening and ids[: len(self.opening)] == self.opening else []

    def _before_answer(self, prompt: str) -> str:
        """Returns all text in front of an answer: the prompt, within its chat template if there is one."""
        prompt = stripped(prompt)
        return prompt if self._turn is None else f"{self._turn.before}{prompt}{self._turn.after}"

    def _answered(self, pairs: Sequence[tuple[str, str]], scored: bool = False) -> list[tuple[_Tokens, int, int]]:
        """Returns whole rows, each with the numbers of answer tokens that are scored and left out (see `encode`)."""
        before, texts, starts = [], [], []
        for prompt, answer in pairs:
            before.append(self._before_answer(prompt))
            plain = self.joined(prompt, answer)
            between = self._turn.joiner if self._turn else plain[len(before[-1]) : len(plain) - len(answer.strip())]
            starts.append(len(before[-1]) + len(between))
            texts.append(f"{before[-1]}{between}{answer.strip()}")
        rows = []
        for prefix, whole, text, start, alone in zip(
            before, self._tokenised(texts), texts, starts, self._tokenised(before), strict=True
        ):
            if whole.ids[: len(alone.ids)] != alone.ids:  # the two would merge into common tokens
                whole = _appended(alone, self._going_on(text[len(prefix) :]), len(prefix))
            first = len(alone.ids)
            if scored:
                first = next((t for t, (_, stop) in enumerate(whole.offsets) if stop > start), len(whole.ids))
            rows.append((whole, len(whole.ids) - first, first - len(alone.ids)))
        return rows

    def _going_on(self, text: str) -> _Tokens:
        """Tokenises text as the continuation of another, without what a tokenizer puts before a text's first word."""
        for anchor in _ANCHORS:
            encoded = self.tokenizer(
                anchor + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            offsets = [(start - len(anchor), stop - len(anchor)) for start, stop in encoded["offset_mapping"]]
            count = sum(stop <= 0 for _, stop in offsets)
            if all(start >= 0 for start, _ in offsets[count:]):
                return _Tokens(encoded["input_ids"][count:], offsets[count:])
        ids = self.token_ids(text)
        return _Tokens(ids, [(0, len(text))] * len(ids))

    def _tokenised(self, texts: Sequence[str]) -> list[_Tokens]:
        """Tokenises texts with the tokens that the tokenizer prepends, once, and without those that it appends."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=self._turn is None, return_offsets_mapping=True, verbose=False
        )
        return [self._bare(*row) for row in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    def _bare(self, ids: list[int], offsets: list[tuple[int, int]]) -> _Tokens:
        size = len(ids)
        while size and tuple(offsets[size - 1]) == (0, 0):
            size -= 1
        first = self.tokenizer.bos_token_id
        # A token that the tokenizer adds covers no text; one that the text opens with does.
        twice = first is not None and ids[:2] == [first, first] and offsets[0][1] == 0 < offsets[1][1]
        return _Tokens(ids[int(twice) : size], offsets[int(twice) : size])


def _appended(tokens: _Tokens, new: _Tokens, length: int) -> _Tokens:
    """Appends tokens to others, whose text is `length` characters long."""
    offsets = [(start + length, stop + length) for start, stop in new.offsets]
    return _Tokens(tokens.ids + new.ids, tokens.offsets + offsets)
