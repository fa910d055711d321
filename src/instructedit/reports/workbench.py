"""Backend of the interactive page: makes, reports, keeps, undoes and packs edits for several visitors."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZIP_DEFLATED, ZipFile

from instructedit.analysis import EditingAreas
from instructedit.editors import Editor, any_editor
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.records import EditRequest
from instructedit.reports.area_map import landmarks, map_among
from instructedit.reports.cases import EditCase
from instructedit.reports.making import edit
from instructedit.reports.ranks import served
from instructedit.reports.report import EditReport
from instructedit.reports.store import keep, undo, write_edit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Visit:
    """The edits of one visitor.

    Attributes:
        report: Report of the last edit; None before the first.
        editor: The editor that made it.
        known: Areas of that editor's edits of known tasks; None until a map is requested.
        kept: Names of the edits that this visitor keeps.
    """

    report: EditReport | None = None
    editor: Editor | None = None
    known: EditingAreas | None = None
    kept: list[str] = field(default_factory=list)

    def last(self) -> EditReport:
        """Returns the report of the last edit.

        Raises:
            UserError: If there is none yet.
        """
        if self.report is None:
            raise UserError("there is no edit yet: make one first")
        return self.report


class Workbench:
    """Edits models for the visitors of a page, who are served one at a time and see only their own edits.

    Args:
        store: Folder to keep edits in.
        models: Names of the models that visitors may choose.
    """

    def __init__(self, store: Path, models: Sequence[str]) -> None:
        self.store, self.models = store, tuple(models)
        self._loaded: dict[str, FrozenLM] = {}
        self._lock = threading.Lock()  # a model has only one edit applied at a time
        self._packed = tempfile.TemporaryDirectory(prefix="instructedit-")  # gone with the workbench

    def edit(
        self, visit: Visit, lm: str, editor: str, prompt: str, target: str, task: str = "", subject: str = "",
        neighbours: str = "",
    ) -> str:  # fmt: skip
        """Makes an edit and reports what it did.

        Args:
            visit: The visit that receives the report.
            lm: Name of one of the models.
            editor: Name or path of the editor, as `any_editor` takes it.
            prompt: What the model is asked.
            target: What it should answer.
            task: Name of the task, for editors that read instructions; may be empty.
            subject: The entity that the edit is about; may be empty.
            neighbours: Prompts whose answers should stay, one per line; drawn if there are none.

        Returns:
            The report as an HTML frame.

        Raises:
            UserError: If there is no such model or editor, or the request does not suit it.
        """
        if lm not in self.models:
            raise UserError(f"no model {lm!r} on this page; there are: {', '.join(self.models)}")
        request = EditRequest(prompt, target, task.strip() or None, subject.strip() or None)
        case = EditCase(request, neighbours=tuple(line for line in neighbours.splitlines() if line.strip()))
        with self._lock:
            model = self._model(lm)
            made_by = any_editor(editor.strip(), model)
            visit.report = edit(model, made_by, case)
        visit.editor, visit.known = made_by, None
        return page_of(visit.report)

    def map(self, visit: Visit) -> Figure:
        """Draws where the visitor's last edit lies among the same editor's edits of the embedded tasks.

        Raises:
            UserError: If there is no edit yet, or its editor's edits have no map.
        """
        report, editor = visit.last(), visit.editor
        assert editor is not None  # it made the report
        with self._lock:
            visit.known = visit.known or landmarks(editor)
            return map_among(visit.known, report.edits[0], editor.name)

    def keep(self, visit: Visit, name: str) -> str:
        """Keeps the visitor's last edit in the store and returns a message.

        Raises:
            UserError: If there is no edit yet, or the name is taken or cannot name a folder.
        """
        with self._lock:
            report, small = served(self._model(visit.last().lm), visit.last(), None)
            keep(self._model(report.lm), report, name.strip(), self.store)
        visit.kept.append(name.strip())
        return f"kept as {name.strip()}" + (f", {small}" if small else "")

    def undo(self, visit: Visit, name: str) -> str:
        """Removes an edit that the visitor kept and returns a message.

        Raises:
            UserError: If this visitor kept no edit of that name.
        """
        name = name.strip()
        if name not in visit.kept:
            raise UserError(
                f"you kept no edit {name!r}" + (f"; you have: {', '.join(visit.kept)}" if visit.kept else "")
            )
        with self._lock:
            undo(name, self.store)
        visit.kept.remove(name)
        return f"{name} is removed; the model is what it was"

    def pack(self, visit: Visit) -> str:
        """Writes the visitor's last edit to a zip file: an adapter if it is of low rank, its report and its requests.

        Returns:
            The file, in a new folder that lasts as long as the workbench.

        Raises:
            UserError: If there is no edit yet.
        """
        last = visit.last()
        file = Path(tempfile.mkdtemp(dir=self._packed.name), "edit.zip")
        with tempfile.TemporaryDirectory() as folder:
            with self._lock:
                model = self._model(last.lm)
                report, _ = served(model, last, None)
                write_edit(model, report, Path(folder))
            with ZipFile(file, "w", ZIP_DEFLATED) as packed:
                for each in sorted(Path(folder).iterdir()):
                    packed.write(each, each.name)
        return str(file)

    def _model(self, name: str) -> FrozenLM:
        if name not in self._loaded:
            self._loaded[name] = FrozenLM.from_pretrained(name)
        return self._loaded[name]


def page_of(report: EditReport) -> str:
    """Returns a report as a sandboxed iframe with its own style, in which no script runs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.html")
        report.save_html(file)
        page = file.read_text(encoding="utf-8")
    look = "width: 100%; height: 44rem; border: 0"
    return f'<iframe title="edit report" sandbox="" style="{look}" srcdoc="{escape(page)}"></iframe>'
