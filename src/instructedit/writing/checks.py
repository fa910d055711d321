"""Rules that a description must satisfy before it may stand in a bank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from instructedit.instructions import InstructionBank, bank_names
from instructedit.instructions.bank import SLOT
from instructedit.records import EditRecord

#: Limits on the words of a description; a slot counts as one.
LEAST, MOST = 4, 40
#: Two descriptions are near-duplicates if their sets of words have at least this Jaccard index.
OVERLAP = 0.5
#: Length, in letters and digits, of the shortest term that is looked for: the target "A" would forbid every "a".
SHORTEST = 3


@dataclass(frozen=True)
class Terms:
    """Subjects, targets and prompts of records, to be looked for in descriptions.

    Attributes:
        phrases: Their words, in lower case, joined by single spaces.
        records: Number of records that they come from.
        too_short: Number of terms that are too short to be looked for.
    """

    phrases: frozenset[str] = frozenset()
    records: int = 0
    too_short: int = 0

    @classmethod
    def of(cls, records: Sequence[EditRecord]) -> Self:
        """Collects the terms of records."""
        requests = [record.request for record in records]
        texts = {text for r in requests for text in (r.prompt, r.target, r.subject) if text}
        phrases = {normal(text) for text in texts}
        long_enough = frozenset(phrase for phrase in phrases if len(phrase.replace(" ", "")) >= SHORTEST)
        return cls(long_enough, len(records), len(phrases) - len(long_enough))

    def found_in(self, text: str) -> str | None:
        """Finds the longest term that occurs in the text as whole words, ignoring case; None if there is none."""
        words = normal(SLOT.sub(" ", text)).split()
        for size in range(len(words), 0, -1):
            for start in range(len(words) - size + 1):
                if (phrase := " ".join(words[start : start + size])) in self.phrases:
                    return phrase
        return None


class Problem(NamedTuple):
    """Reason why a text may not be a description: the rule that it breaks, and the words that break it."""

    rule: str
    what: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}" if self.what else self.rule


@dataclass(frozen=True)
class Rules:
    """Requirements that every description of a task must meet.

    Attributes:
        slots: Slots that it must contain, and no others.
        test: Terms of the task's test records, none of which may occur; they serve no other purpose.
        shown: Terms of the records that the writer was shown, none of which may occur: it describes the whole task.
        taken: Descriptions of other tasks: normal form → where it comes from.
    """

    slots: frozenset[str] = frozenset()
    test: Terms = Terms()
    shown: Terms = Terms()
    taken: Mapping[str, str] = field(default_factory=dict)

    def problem(self, text: str, others: Iterable[str] = ()) -> Problem | None:
        """Returns the first reason why a text may not be a description; None if it may.

        Args:
            text: The text, one line.
            others: The other descriptions in the bank.
        """
        return next(self._problems(text, others), None)

    def _problems(self, text: str, others: Iterable[str]) -> Iterator[Problem]:
        count = len(normal(text).split())
        found = set(SLOT.findall(text))
        if not count:
            yield Problem("is empty")
        if not text.isprintable():
            yield Problem("has control characters")
        yield from (Problem("lacks a slot", f"[{slot}]") for slot in sorted(self.slots - found))
        yield from (Problem("has an unknown slot", f"[{slot}]") for slot in sorted(found - self.slots))
        if count < LEAST:
            yield Problem(f"has fewer than {LEAST} words")
        if count > MOST:
            yield Problem(f"has more than {MOST} words")
        if term := self.test.found_in(text):
            yield Problem("leaks a test record", term)
        if term := self.shown.found_in(text):
            yield Problem("names a record that was shown", term)
        if place := self.taken.get(normal(text)):
            yield Problem("describes another task", place)
        for other in others:
            if normal(other) == normal(text):
                yield Problem("is a duplicate", other)
            if overlap(other, text) >= OVERLAP:
                yield Problem("is a near-duplicate", other)


def normal(text: str) -> str:
    """Returns a text's words in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def overlap(a: str, b: str) -> float:
    """Computes the Jaccard index of two texts' sets of words, 0..1; slots count as words."""
    one, other = set(normal(a).split()), set(normal(b).split())
    return len(one & other) / len(one | other) if one | other else 1.0


def others_descriptions(task: str) -> dict[str, str]:
    """Collects the packaged descriptions of all other tasks: normal form → where it comes from."""
    banks = {name: InstructionBank.for_task(name) for name in bank_names() if name != task}
    return {normal(d.text): f"{d.id} of task {name}" for name, bank in banks.items() for d in bank.descriptions}
