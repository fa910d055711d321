"""An edit record as an editor reads it: with its instruction drawn and in front of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from instructedit.instructions.instructor import Instructor
from instructedit.records import EditRecord, Probe


@dataclass(frozen=True)
class RenderedRecord:
    """A record whose instruction is drawn.

    Attributes:
        record: The record, in plain text.
        prefix: Its instruction, which stands in front of its in-scope prompts; empty for none.
        apart: Whether the editor reads the instruction beside the request rather than in front of it.
    """

    record: EditRecord
    prefix: str = ""
    apart: bool = False

    @property
    def prompt(self) -> str:
        """The request's prompt as the editor reads it."""
        return self.record.request.prompt if self.apart else self.prefix + self.record.request.prompt

    def ask(self, probe: Probe) -> str:
        """The probe's prompt as the model is asked: locality probes stand without an instruction."""
        return probe.prompt if probe.kind == "locality" else self.prefix + probe.prompt


def render_records(
    records: Sequence[EditRecord], instructor: Instructor | None, steps: Sequence[int] = ()
) -> list[RenderedRecord]:
    """Draws the instruction of each record, once for all of its prompts.

    Args:
        records: The records.
        instructor: Draws the instructions; None leaves prompts plain.
        steps: The training step of each record, on which its draw depends; 0 by default.

    Raises:
        UserError: See `Instructor.prefix`.
    """
    if instructor is None:
        return [RenderedRecord(record) for record in records]
    at = steps or [0] * len(records)
    return [
        RenderedRecord(record, instructor.prefix(record.request, step, record.id), instructor.apart)
        for record, step in zip(records, at, strict=True)
    ]
