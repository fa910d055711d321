"""Task instructions: banks of descriptions, from which one is drawn and prepended to an edit's prompts."""

from __future__ import annotations

from instructedit.instructions.bank import Description, InstructionBank, Provenance, Split, add_bank, bank_names
from instructedit.instructions.instructor import Instructor, Variant
from instructedit.instructions.rendered import RenderedRecord, render_records
from instructedit.instructions.rendering import render

__all__ = [
    "Description",
    "InstructionBank",
    "Instructor",
    "Provenance",
    "RenderedRecord",
    "Split",
    "Variant",
    "add_bank",
    "bank_names",
    "render",
    "render_records",
]
