"""Edit records with their drawn instructions, as an editor reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from instructedit.instructions.instructor import Instructor
from instructedit.records import OUT_OF_SCOPE, EditRecord, Probe


@dataclass(frozen=True)
class RenderedRecord:
    """A record with its drawn instruction.

    Attributes:
        record: The record, in plain text.
        prefix: Its instruction, to prepend to its in-scope prompts; empty for none.
        apart: Whether the editor reads the instruction separately, rather than prepended to the request.
    """

    record: EditRecord
    prefix: str = ""
    apart: bool = False

    @property
    def prompt(self) -> str:
        """The request's prompt as the editor reads it."""
        return self.record.request.prompt if self.apart else self.prefix + self.record.request.prompt

    def ask(self, probe: Probe) -> str:
        """Returns the probe's prompt as the model reads it; those out of scope have no instruction."""
        return probe.prompt if probe.kind in OUT_OF_SCOPE else self.prefix + probe.prompt


def render_records(
    records: Sequence[EditRecord], instructor: Instructor | None, steps: Sequence[int] = ()
) -> list[RenderedRecord]:
    """Draws the instruction of each record, once for all of its prompts.

    Args:
        records: The records.
        instructor: Draws the instructions; None leaves prompts plain.
        steps: The training step of each record, on which the draw depends; 0 by default.

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
