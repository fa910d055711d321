"""Crossed questions: what is asked about one subject, asked about another, so that the scope meets more relations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from instructedit.records import EditRecord

#: A prompt before and after its subject.
Template = tuple[str, str]


class Crossed(NamedTuple):
    """A question that is taken for a request of its own.

    Attributes:
        record: Number of the record about whose subject it asks.
        prompt: The question; the record's own request and locality probes are out of its scope.
        renamed: The same about another name of the subject, and so in its scope; None if the record has no other name.
        own: The record's request about that name, and so out of its scope; None likewise.
    """

    record: int
    prompt: str
    renamed: str | None
    own: str | None

    @property
    def asked(self) -> list[tuple[str, bool]]:
        """Its probes that are known from the texts, and whether each is in its scope."""
        named = [(self.renamed, True), (self.own, False)]
        return [(self.prompt, True), *((text, inside) for text, inside in named if text is not None)]


class Crossing:
    """Draws crossed questions from the templates of requests and locality probes of each task that were seen so far.

    Only records with a locality probe about the request's own subject count, since in their task another template asks
    something else. A template is used once it was seen about two subjects: one of a single record may hold more than
    its relation.

    Args:
        count: Most questions for each record.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen: dict[str, dict[Template, str]] = {}  # task → template → its only subject; empty for several

    def __call__(self, records: Sequence[EditRecord]) -> list[Crossed]:
        """Draws the questions of a batch, a function of its records and of the templates seen; takes note of theirs."""
        for record in records:
            self._note(record)
        rng = random.Random("\n".join(record.id for record in records))
        drawn = []
        for number, record in enumerate(records):
            own = template(record.request.prompt, record.request.subject)
            if own is None:
                continue
            seen = self.seen.get(str(record.request.task), {})
            known = [one for one, subject in seen.items() if not subject and one != own]
            name = _other_name(record, own)
            for before, after in rng.sample(known, min(self.count, len(known))):
                renamed = name and f"{before}{name}{after}"
                prompt = f"{before}{record.request.subject}{after}"
                drawn.append(Crossed(number, prompt, renamed, name and f"{own[0]}{name}{own[1]}"))
        return drawn

    def _note(self, record: EditRecord) -> None:
        subject = str(record.request.subject)
        others = [template(probe.prompt, record.request.subject) for probe in record.of("locality")]
        if any(others):
            templates = self.seen.setdefault(str(record.request.task), {})
            for found in filter(None, (template(record.request.prompt, subject), *others)):
                templates[found] = subject if templates.get(found, subject) == subject else ""

    def state(self) -> dict[str, Any]:
        """Returns the templates as plain values, for a checkpoint."""
        return {task: [[*one, subject] for one, subject in seen.items()] for task, seen in self.seen.items()}

    def recall(self, state: Mapping[str, Any]) -> None:
        """Takes the templates from a checkpoint."""
        self.seen = {task: {(a, b): subject for a, b, subject in seen} for task, seen in state.items()}


def template(prompt: str, subject: str | None) -> Template | None:
    """Returns a prompt before and after its subject; None if the subject is unknown or not in it."""
    before, found, after = prompt.partition(subject or prompt)
    return (before, after) if found == subject else None


def _other_name(record: EditRecord, own: Template) -> str | None:
    """Returns the name by which a rephrasing in the words of the request calls its subject, if there is one."""
    for probe in record.of("generalization"):
        name = probe.prompt.removeprefix(own[0]).removesuffix(own[1])
        if f"{own[0]}{name}{own[1]}" == probe.prompt and name.strip() and str(record.request.subject) not in name:
            return name
    return None
