"""The questions that show what an edit did: one prompt with one answer each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from instructedit.instructions import RenderedRecord
from instructedit.records import OUT_OF_SCOPE, EditRecord, Probe

#: Kinds of probes that should give their own answer after the edit.
IN_SCOPE = ("reliability", "generalization", "portability")
#: Kinds of ConvSent's probes: replies of the wanted sentiment, and of the other.
REPLIES = ("wanted", "opposite")


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
    """Yields every question of a batch of records, one for each accepted answer.

    In-scope probes are asked both with the instruction in front and plainly (records without an instruction: plainly
    only), ConvSent's replies only with the instruction if there is one, and probes out of scope only plainly.

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
            if probe.kind in OUT_OF_SCOPE:
                yield Question(request_index, record, probe, number, "plain", True, probe.prompt, probe.answers[0])
                continue
            views = [("instructed", one.ask(probe))] if one.prefix else []
            views += [("plain", probe.prompt)] if not views or probe.kind not in REPLIES else []
            for place, (view, prompt) in enumerate(views):
                for answer in probe.answers:
                    yield Question(request_index, record, probe, number, view, place == 0, prompt, answer)
