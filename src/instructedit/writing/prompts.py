"""Questions to the model, and the form of its replies; different words need a new `VERSION`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from instructedit.errors import UserError
from instructedit.instructions import InstructionBank, bank_names
from instructedit.writing.card import TaskCard
from instructedit.writing.checks import LEAST, MOST
from instructedit.writing.clients import Message, Question, Reply, Writer

VERSION = "1"
#: Times that a model is asked for a reply of the right form.
ATTEMPTS = 3
_QUOTED = 1000  # characters of a bad reply that are quoted

_SYSTEM = (
    "You write short descriptions of knowledge-editing tasks. An editor of language models reads one of them in front "
    "of every edit, to know what kind of change is wanted."
)
_JSON = "Reply with JSON of the given form and nothing else."
_LIST = "Reply with the descriptions alone, as a list: one a line, each after a dash."


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Descriptions(_Form):
    """Reply to `generation`."""

    descriptions: list[str]


class Revision(_Form):
    """Another wording for the description of an id."""

    id: str
    text: str


class Revisions(_Form):
    """Reply to `revision`."""

    revisions: list[Revision]


class Grade(_Form):
    """Of the description with a number, counted from 1."""

    number: int
    clarity: int = Field(ge=1, le=5)
    concision: int = Field(ge=1, le=5)


class Grades(_Form):
    """Reply to `judgement`."""

    grades: list[Grade]


F = TypeVar("F", bound=_Form)


def generation(
    card: TaskCard, count: int, seed: int, so_far: Sequence[str] = (), faults: Sequence[str] = ()
) -> Question:
    """Builds the question that asks for descriptions of a task.

    Args:
        card: The task's card.
        count: Number of descriptions.
        seed: Seed of the reply.
        so_far: Existing descriptions, which are not to be repeated.
        faults: What was wrong with earlier ones.
    """
    parts = [
        str(card),
        f"Write {count} descriptions of this task, each one sentence that tells an editor what kind of change to make. "
        f"{_rules(card)} Vary words and structure: no two may share half of their words.",
        *_listed("These are there already; write others:", so_far),
        *_listed("Earlier ones were refused for these reasons:", faults),
    ]
    return _question(parts, '{"descriptions": ["…", …]}', Descriptions, seed, _examples(card) + "-")


def revision(card: TaskCard, count: int, seed: int, figures: str, refused: Sequence[str] = ()) -> Question:
    """Builds the question that asks for better wordings of descriptions.

    Args:
        card: The task's card.
        count: Maximum number of revisions.
        seed: Seed of the reply.
        figures: The descriptions with their ids, figures and failures.
        refused: Revisions that were not better, or not allowed.
    """
    parts = [
        str(card),
        "A trial editor was measured with each description on validation records (means × 100, more is better):",
        figures,
        *_listed("These revisions were tried and not kept:", refused),
        f"Propose up to {count} revisions that should raise the figures, each with the id of the description that it "
        f"would replace. {_rules(card)}",
    ]
    return _question(parts, '{"revisions": [{"id": "…", "text": "…"}, …]}', Revisions, seed, _examples(card) + "-")


def judgement(card: TaskCard, texts: Sequence[str], seed: int) -> Question:
    """Builds the question that asks how clear and how concise descriptions are."""
    numbered = [f"{i}. {text}" for i, text in enumerate(texts, 1)]
    parts = [
        str(card),
        "Grade each of these descriptions of the task from 1 (poor) to 5 (good) for clarity and for concision:",
        "\n".join(numbered),
    ]
    return _question(parts, '{"grades": [{"number": 1, "clarity": 5, "concision": 5}, …]}', Grades, seed, "")


def _rules(card: TaskCard) -> str:
    slots = f" Each must hold {' and '.join(f'[{slot}]' for slot in card.slots)} exactly so." if card.slots else ""
    brackets = "no other square brackets" if card.slots else "no square brackets"
    return (
        f"Each has {LEAST} to {MOST} words, better 8 to 18, and {brackets}; it speaks of the task, and names "
        f"nothing out of any record.{slots}"
    )


def _listed(head: str, lines: Sequence[str]) -> list[str]:
    return ["\n".join([head, *(f"- {line}" for line in lines)])] if lines else []


def _examples(card: TaskCard) -> str:
    """Builds the start for a model that only continues text: another task with descriptions, then this one without."""
    names = [name for name in bank_names() if name != card.task]
    banks = [InstructionBank.for_task(name) for name in names]
    alike = [b for b in banks if bool(b.descriptions[0].slots) == bool(card.slots)] or banks
    shown = "\n".join(f"- {d.text}" for d in alike[0].descriptions[:2])
    return f"Task: {alike[0].task}\n{shown}\n\nTask: {card.title}. {card.edits}\n"


def _question(parts: Sequence[str], shape: str, form: type[BaseModel], seed: int, start: str) -> Question:
    messages: tuple[Message, ...] = (
        {"role": "system", "content": f"{_SYSTEM} {_JSON}"},
        {"role": "user", "content": "\n\n".join([*parts, f"Form: {shape}"])},
    )
    return Question(messages, start, form.model_json_schema(), seed, "\n\n".join([_SYSTEM, *parts, _LIST]))


# -- replies ---------------------------------------------------------------------------------------------------------


class _UnusableError(Exception):
    """Error that says what is wrong with a reply."""


def asked(
    writer: Writer, question: Question, form: type[F], check: Callable[[F], str | None] = lambda found: None
) -> F:
    """Asks a question and parses the reply; an unusable reply is sent back together with what is wrong with it.

    Args:
        writer: The writer that is asked.
        question: The question.
        form: Form of the reply.
        check: Returns what else is wrong with a reply; None if nothing is.

    Raises:
        UserError: If the model gives no usable reply in `ATTEMPTS` attempts.
    """
    now, problem = question, ""
    for attempt in range(1, ATTEMPTS + 1):
        reply = writer.ask(now)
        try:
            found = _parsed(reply, form)
            if fault := check(found):
                raise _UnusableError(fault)
            return found
        except _UnusableError as error:
            problem = str(error)
        complaint = f"This reply cannot be used: {problem}. Reply again, with the JSON alone."
        talk: tuple[Message, ...] = (
            {"role": "assistant", "content": reply.text[:_QUOTED] or "(nothing)"},
            {"role": "user", "content": complaint},
        )
        now = replace(question, messages=(*question.messages, *talk), seed=question.seed + 1000 * attempt)
    raise UserError(f"{writer.model.name}: no usable reply in {ATTEMPTS} attempts; the last one {problem}")


def _parsed(reply: Reply, form: type[F]) -> F:
    if reply.refusal:
        raise _UnusableError(f"is a refusal: {reply.refusal[:_QUOTED]!r}")
    if reply.cut:
        raise _UnusableError(f"was cut off at the limit on its length ({reply.reply_tokens or '?'} tokens)")
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", reply.text, re.DOTALL)
    try:
        return form.model_validate_json(fenced[1] if fenced else reply.text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _UnusableError(f"is not of the form asked for ({place + ': ' if place else ''}{first['msg']})") from error


def listed_lines(reply: Reply) -> list[str]:
    """Extracts the first list of a text, one item a line, after a dash or a number; quotation marks are taken off."""
    lines = reply.text.split("\n")
    kept: list[str] = []
    for line in lines[:-1] if reply.cut else lines:
        if found := re.match(r"\s*(?:[-*•]|\d+[.)]\s)\s*(.*)", line):
            kept.append(" ".join(found[1].split()).strip('"“”'))
        elif kept and line.strip():
            break  # the list is over
    return kept
