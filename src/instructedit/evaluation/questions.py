"""The questions that show what an edit did: one prompt with one answer each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from instructedit.instructions import RenderedRecord
from instructedit.records import OUT_OF_SCOPE, REPLIES, EditRecord, Probe


@dataclass(frozen=True)
class Question:
    """One prompt with one answer, put to the model under one edit.

    Attributes:
        request_index: Number of the record in its batch.
        record: The record itself.
        probe: What the question is about.
        number: Index of the probe within its record; 0 is the request itself.
        view: Prompt style, ``instructed`` or ``plain``.
        main: Whether the headline metrics count it.
        prompt: The prompt as the model reads it.
        answer: One of the probe's answers.
    """

    request_index: int
    record: EditRecord
    probe: Probe
    number: int
    view: str
    main: bool
    prompt: str
    answer: str


def questions(rendered: Sequence[RenderedRecord], replies: int) -> Iterator[Question]:
    """Yields every question of a batch of records, one for each accepted answer; out of scope only for the first.

    Args:
        rendered: The records with their instructions.
        replies: Number of replies of each sentiment to ask for; the first ones of a record are taken.
    """
    for request_index, one in enumerate(rendered):
        record = one.record
        of_kind: Counter[str] = Counter()
        for number, probe in enumerate((record.reliability, *record.probes)):
            of_kind[probe.kind] += 1
            if probe.kind in REPLIES and of_kind[probe.kind] > replies:
                continue
            answers = probe.answers[:1] if probe.kind in OUT_OF_SCOPE else probe.answers
            for place, (view, prompt) in enumerate(_views(one, probe)):
                for answer in answers:
                    yield Question(request_index, record, probe, number, view, place == 0, prompt, answer)


def _views(one: RenderedRecord, probe: Probe) -> list[tuple[str, str]]:
    """Returns the ways in which a probe is asked, view and prompt; headline metrics count the first."""
    plain, instructed = ("plain", probe.prompt), ("instructed", one.prefix + probe.prompt)
    if not one.prefix or probe.kind == "locality":
        return [plain]
    if probe.kind in OUT_OF_SCOPE:
        return [plain, instructed]
    return [instructed] if probe.kind in REPLIES else [instructed, plain]
