"""Knowledge editing for language models: one instruction-guided editor for many tasks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instructedit.data import with_neighbors
    from instructedit.editors import Editor, build_editor, editor_names, load_editor
    from instructedit.edits import Edit, LowRankEdit, load_edit
    from instructedit.errors import UserError
    from instructedit.evaluation import EditSequence, Evaluation, Scores, edit_sequence, evaluate
    from instructedit.instructions import InstructionBank
    from instructedit.lm import FrozenLM
    from instructedit.records import EditRecord, EditRequest, Probe
    from instructedit.reports import EditCase, EditReport, edit, read_cases
    from instructedit.tasks import load_records, task_names

_HOME = {
    "Edit": "edits", "EditCase": "reports", "EditRecord": "records", "EditReport": "reports", "EditRequest": "records",
    "EditSequence": "evaluation", "Editor": "editors", "Evaluation": "evaluation", "FrozenLM": "lm",
    "InstructionBank": "instructions", "LowRankEdit": "edits", "Probe": "records", "Scores": "evaluation",
    "UserError": "errors", "build_editor": "editors", "edit": "reports", "edit_sequence": "evaluation",
    "editor_names": "editors", "evaluate": "evaluation", "load_edit": "edits", "load_editor": "editors",
    "load_records": "tasks", "read_cases": "reports", "task_names": "tasks",
    "with_neighbors": "data",
}  # fmt: skip

__all__ = [
    "Edit", "EditCase", "EditRecord", "EditReport", "EditRequest", "EditSequence", "Editor", "Evaluation", "FrozenLM",
    "InstructionBank", "LowRankEdit", "Probe", "Scores", "UserError", "build_editor", "edit", "edit_sequence",
    "editor_names", "evaluate", "load_edit", "load_editor", "load_records", "read_cases", "task_names",
    "with_neighbors",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported at first use: torch and transformers take seconds, and `--help` needs neither.
    if name in _HOME:
        return getattr(import_module(f"instructedit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'instructedit' has no attribute {name!r}")
