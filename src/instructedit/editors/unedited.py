"""The model as it is: the row that every other is compared with."""

from __future__ import annotations

from typing import ClassVar

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.edits import Edit, IdentityEdit


class Unedited(Editor):
    """Makes edits that change nothing."""

    name: ClassVar[str] = "unedited"

    def compute_edit(self, batch: RequestBatch) -> Edit:
        return IdentityEdit(len(batch))
