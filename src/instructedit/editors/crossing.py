"""Crossed questions: what is asked about one subject, asked about another, so that the scope learns to tell both apart.

Another relation about the request's subject is a request of its own, and the request's relation about another subject
is out of the request's scope.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from heapq import nsmallest
from typing import Any, NamedTuple, TypeVar

from instructedit.data.neighborhood import Template, template
from instructedit.records import EditRecord

_T = TypeVar("_T")


class Crossed(NamedTuple):
    """A question that is taken for a request of its own.

    Attributes:
        record: Number of the record about whose subject it asks.
        prompt: The question; the record's own request and locality probes are out of its scope.
        renamed: The same about another name of the subject, and so in its scope; None if the record has no other name.
        own: The record's request about that name, and so out of its scope; None likewise.
        elsewhere: The same about other subjects, and so out of its scope.
    """

    record: int
    prompt: str
    renamed: str | None
    own: str | None
    elsewhere: tuple[str, ...] = ()

    @property
    def asked(self) -> list[tuple[str, bool]]:
        """Its probes that are known from the texts, and whether each is in its scope."""
        named = [(self.renamed, True), (self.own, False), *((text, False) for text in self.elsewhere)]
        return [(self.prompt, True), *((text, inside) for text, inside in named if text is not None)]


class Crossing:
    """Draws crossed questions from the templates of requests and locality probes of each task that were seen so far.

    Only records with a locality probe about the request's own subject count, since in their task another template asks
    something else. A template is used once it was seen about two subjects: one of a single record may hold more than
    its relation. Other subjects are drawn from those that it was seen about, which are of the same kind.

    What a record draws of the same choice is always the same, and of a larger choice mostly, so that the states of its
    questions are in the prefix cache when it comes again.

    Args:
        count: Most questions for each record.
        subjects: Most other subjects about whom a request's or a crossed question's template is asked.
    """

    def __init__(self, count: int, subjects: int = 0) -> None:
        self.count, self.subjects = count, subjects
        self.seen: dict[str, dict[Template, list[str]]] = {}  # task → template → its subjects

    def __call__(self, records: Sequence[EditRecord]) -> tuple[list[Crossed], list[tuple[int, str]]]:
        """Draws the questions of a batch, a function of its records and of what was seen; takes note of theirs.

        Returns:
            The crossed questions; and what each record's request asks, asked about other subjects, with the record's
            number.
        """
        for record in records:
            self._note(record)
        drawn, elsewhere = [], []
        for number, record in enumerate(records):
            subject = str(record.request.subject)
            own = template(record.request.prompt, record.request.subject)
            if own is None:
                continue
            seen = self.seen.get(str(record.request.task), {})
            known = [one for one, subjects in seen.items() if len(subjects) > 1 and one != own]
            name = _other_name(record, own)
            for before, after in _drawn(record.id, known, self.count):
                others = self._elsewhere(record, seen, (before, after))
                renamed = name and f"{before}{name}{after}"
                prompt = f"{before}{subject}{after}"
                drawn.append(Crossed(number, prompt, renamed, name and f"{own[0]}{name}{own[1]}", others))
            elsewhere += [(number, text) for text in self._elsewhere(record, seen, own)]
        return drawn, elsewhere

    def _elsewhere(self, record: EditRecord, seen: Mapping[Template, list[str]], asked: Template) -> tuple[str, ...]:
        """Draws the questions of a template about subjects that it was seen about, other than the record's."""
        before, after = asked
        others = [f"{before}{other}{after}" for other in seen.get(asked, []) if other != record.request.subject]
        return tuple(_drawn(record.id, others, self.subjects))

    def _note(self, record: EditRecord) -> None:
        subject = str(record.request.subject)
        others = [template(probe.prompt, record.request.subject) for probe in record.of("locality")]
        if any(others):
            templates = self.seen.setdefault(str(record.request.task), {})
            for found in filter(None, (template(record.request.prompt, subject), *others)):
                subjects = templates.setdefault(found, [])
                if subject not in subjects:
                    subjects.append(subject)

    def state(self) -> dict[str, Any]:
        """Returns the templates and their subjects as plain values, for a checkpoint."""
        return {task: [[*one, subjects] for one, subjects in seen.items()] for task, seen in self.seen.items()}

    def recall(self, state: Mapping[str, Any]) -> None:
        """Takes the templates from a checkpoint."""
        self.seen = {task: {(a, b): [*subjects] for a, b, subjects in seen} for task, seen in state.items()}


def _drawn(record: str, choice: Iterable[_T], count: int) -> list[_T]:
    """Draws at most `count` of a choice by hashes of the record and each: one more to choose from rarely changes it."""

    def order(one: _T) -> bytes:
        return hashlib.sha256(f"{record}\n{one}".encode("utf-8", "surrogatepass")).digest()

    return nsmallest(count, choice, key=order)


def _other_name(record: EditRecord, own: Template) -> str | None:
    """Returns the name by which a rephrasing in the words of the request calls its subject, if there is one."""
    for probe in record.of("generalization"):
        name = probe.prompt.removeprefix(own[0]).removesuffix(own[1])
        if f"{own[0]}{name}{own[1]}" == probe.prompt and name.strip() and str(record.request.subject) not in name:
            return name
    return None
