"""Neighborhood probes: what a request asks, asked about other subjects, which shows how far an edit spreads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from instructedit.records import EditRecord, Probe

#: A prompt before and after its subject.
Template = tuple[str, str]


def template(prompt: str, subject: str | None) -> Template | None:
    """Returns a prompt before and after its subject; None if the subject is unknown or not in it."""
    before, found, after = prompt.partition(subject or prompt)
    return (before, after) if found == subject else None


def with_neighbors(
    records: Sequence[EditRecord], count: int, among: Sequence[EditRecord] | None = None
) -> list[EditRecord]:
    """Adds neighborhood probes to records: their requests' words, about the subjects of other records.

    A probe is the request of another record of the same task and template, with its target as the answer at whose
    positions the edited and the unedited model are compared. Locality probes of many datasets ask about the request's
    own subject, so that they do not show whether an edit spreads to other subjects.

    Args:
        records: The records.
        count: Most probes for each record.
        among: Records to take other subjects from; the records themselves by default.

    Returns:
        The records in order; those that nothing else asks the same as are unchanged.
    """
    asked: dict[tuple[str, Template], dict[str, Probe]] = {}  # task and template → subject → probe
    for record in records if among is None else among:
        if found := template(record.request.prompt, record.request.subject):
            probe = Probe("neighborhood", record.request.prompt, (record.request.target,))
            asked.setdefault((record.task, found), {}).setdefault(str(record.request.subject), probe)
    return [_with(record, count, asked) for record in records]


def _with(record: EditRecord, count: int, asked: dict[tuple[str, Template], dict[str, Probe]]) -> EditRecord:
    own = template(record.request.prompt, record.request.subject)
    found = asked.get((record.task, own), {}) if own else {}
    others = [probe for subject, probe in found.items() if subject != record.request.subject]
    drawn = random.Random(record.id).sample(others, min(count, len(others)))
    return replace(record, probes=(*record.probes, *drawn)) if drawn else record
