"""Logs which file the editor of a test comes from, so that an audit can detect whether the file has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812

from instructedit.artifacts import artifacts
from instructedit.editors.sources import WEIGHTS
from instructedit.edits.checksums import file_checksum


class TestedEditor(L.Callback):
    """Logs ``tested_editor.json`` when a test begins: the ``method``, and ``file`` and ``sha256`` of its weights.

    The last two are null if the editor has no file, because it needs no training or was never saved.
    """

    __test__ = False  # pytest must not collect this class

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Logs the file before anything is scored."""
        folder = pl_module.editor_folder
        file = Path(folder, WEIGHTS) if folder else Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if not trainer.is_global_zero:
            return
        found = {"file": str(file), "sha256": file_checksum(file)} if file else {"file": None, "sha256": None}
        for keeper in artifacts(trainer):
            keeper.log_json({"method": pl_module.editor.name, **found}, "tested_editor")
