"""The unedited model, a baseline for every method."""

from __future__ import annotations

from typing import ClassVar

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.edits import Edit, IdentityEdit


class Unedited(Editor):
    """Baseline whose edits change nothing."""

    name: ClassVar[str] = "unedited"

    def compute_edit(self, batch: RequestBatch) -> Edit:
        return IdentityEdit(len(batch))
