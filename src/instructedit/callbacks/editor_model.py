"""Logs the trained editor with its run, so that it can be loaded without the options of a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812

from instructedit.artifacts import artifacts
from instructedit.editors import load_editor


def best_checkpoint(trainer: Any) -> str:
    """Returns the checkpoint that a fit is judged by: the best, or the last without validation, or ``""`` if none."""
    checkpoint = trainer.checkpoint_callback
    return str(checkpoint.best_model_path or checkpoint.last_model_path) if checkpoint else ""


class EditorModel(L.Callback):
    """Logs the editor of the best checkpoint as the artifact folder ``editor/``, which `load_editor` reads.

    Without validation the last checkpoint is used. In MLflow the editor is a registered model,
    ``<method>-<language model>``.

    Args:
        log: Whether to log the editor.
    """

    def __init__(self, log: bool = True) -> None:
        self.log = log

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs the editor; only now, since Lightning writes the last checkpoint when training ends."""
        best = best_checkpoint(trainer)
        keepers = artifacts(trainer)
        if not self.log or not best or not keepers or not trainer.is_global_zero:
            return
        lm = pl_module.lm
        name = f"{pl_module.editor.name}-{Path(lm.name).name}"
        example = {"prompt": "The capital of France is", "target": "Lyon", "task": next(iter(pl_module.data.titles))}
        with tempfile.TemporaryDirectory() as folder:
            editor = Path(folder, "editor")
            load_editor(best, lm).save_pretrained(editor)
            for keeper in keepers:
                keeper.log_editor(editor, name, example)
