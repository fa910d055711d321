"""Store of kept edits: a folder for each, with the adapter, its report, its requests and the model that it fits."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructedit.edits import DenseEdit, Edit, LowRankEdit, load_edit, to_dense
from instructedit.edits.base import META
from instructedit.errors import UserError, unknown
from instructedit.lm import FrozenLM
from instructedit.reports.cases import EditCase, read_cases
from instructedit.reports.making import Judge
from instructedit.reports.measure import weights_fingerprint
from instructedit.reports.report import EditReport

STORE = "INSTRUCTEDIT_EDITS"
REPORT, REQUESTS, MODEL = "report.json", "requests.json", "model.json"


def store_folder(given: str | None = None) -> Path:
    """Returns the folder of kept edits: `given`, else $INSTRUCTEDIT_EDITS, else ``edits/`` in the working folder."""
    return Path(given or os.environ.get(STORE) or "edits").expanduser()


@dataclass(frozen=True)
class KeptEdit:
    """One kept edit, stored in a folder.

    Attributes:
        folder: The folder.
    """

    folder: Path

    @property
    def name(self) -> str:
        """The name of the edit, which is that of its folder."""
        return self.folder.name

    @property
    def report(self) -> dict[str, Any]:
        """The report as `EditReport.to_dict` gave it when the edit was made.

        Raises:
            UserError: If the file is corrupt.
        """
        return self._read(REPORT)

    @property
    def model(self) -> dict[str, str]:
        """The model that the edit fits: ``name``, ``source`` (where transformers loads it from) and ``fingerprint``.

        Raises:
            UserError: If the file is corrupt.
        """
        return self._read(MODEL)

    @property
    def cases(self) -> list[EditCase]:
        """The requests of the edit, with all prompts that were asked."""
        return read_cases(self.folder / REQUESTS)

    def load(self, lm: FrozenLM) -> Edit:
        """Loads the edit for a model.

        Raises:
            UserError: If it was made for another model, or is corrupt.
        """
        if self.model.get("fingerprint") != weights_fingerprint(lm):
            raise UserError(f"{self.folder}: this edit fits {self.model.get('name')!r}; {lm.name!r} has other weights")
        return load_edit(self.folder).to(lm.device)

    def _read(self, file: str) -> Any:
        try:
            found = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / file}: damaged: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.folder / file}: damaged: expected an object, got {type(found).__name__}")
        return found


def write_edit(lm: FrozenLM, report: EditReport, folder: Path) -> None:
    """Writes a report's only edit with its report, requests and model to a folder, which is created if needed."""
    (edit,) = report.edits
    lm.save(edit, folder)
    report.save_json(folder / REPORT)
    model = {"name": lm.name, "source": lm.source, "fingerprint": report.fingerprint}
    for file, content in ((REQUESTS, [_record(each.case) for each in report.requests]), (MODEL, model)):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def keep(lm: FrozenLM, report: EditReport, name: str, store: Path) -> Path:
    """Keeps a report's only edit in a store, completely or not at all.

    Raises:
        UserError: If the name cannot name a folder, or is taken.
    """
    place = free_place(name, store)
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".") as folder:
        write_edit(lm, report, Path(folder, name))
        Path(folder, name).rename(place)
    return place


def free_place(name: str, store: Path) -> Path:
    """Returns the folder for a new edit of this name.

    Raises:
        UserError: If the name cannot name a folder, or is taken.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"{name!r} is no name for an edit: letters, digits and dashes, say")
    if (store / name).exists():
        raise UserError(f"{store}: there is an edit {name!r} already; undo it first, or take another name")
    return store / name


def kept_edits(store: Path) -> list[KeptEdit]:
    """Returns the edits of a store, sorted by name."""
    return [KeptEdit(file.parent) for file in sorted(store.glob(f"[!.]*/{MODEL}")) if _is_kept(file.parent)]


def kept_edit(name: str, store: Path, anywhere: bool = True) -> KeptEdit:
    """Finds an edit by its name in a store or, if allowed, by the path of its folder anywhere.

    Raises:
        UserError: If there is no such edit.
    """
    there = kept_edits(store)
    for each in there:
        if each.name == name:
            return each
    if anywhere and _is_kept(folder := Path(name).expanduser()):
        return KeptEdit(folder)
    raise unknown("edit", name, [each.name for each in there])


def undo(name: str, store: Path) -> Path:
    """Removes an edit from a store; nothing else has to be undone, since no model was changed.

    Raises:
        UserError: If the store has no edit of this name; folders elsewhere are never removed.
    """
    folder = kept_edit(name, store, anywhere=False).folder
    shutil.rmtree(folder)
    return folder


def _is_kept(folder: Path) -> bool:
    return all((folder / file).is_file() for file in (MODEL, REPORT, REQUESTS, META))


def combined(edits: Sequence[Edit]) -> Edit:
    """Combines several edits into one whose weight change is the sum of theirs.

    Raises:
        UserError: If one of them does not change weights.
    """
    for edit in edits:
        if not edit.is_weights or len(edit) != 1 or not edit.sites:
            raise UserError(f"an edit of the kind {edit.name!r} cannot be added to others")
    if all(isinstance(edit, LowRankEdit) for edit in edits):  # whatever their number, the sum stays an adapter
        return functools.reduce(LowRankEdit.plus, edits)  # type: ignore[arg-type]
    return functools.reduce(DenseEdit.plus, map(to_dense, edits))


def report_on(lm: FrozenLM, edit: Edit, cases: Sequence[EditCase], name: str, options: Mapping[str, Any]) -> EditReport:
    """Reports on all cases under one existing edit."""
    reports = Judge(lm)(cases, edit)
    return EditReport(lm.name, weights_fingerprint(lm), name, options, True, "tiny", "", tuple(reports), (edit,))


def _record(case: EditCase) -> dict[str, Any]:
    """Returns a case in the form that `read_cases` reads."""
    request = case.request
    record = {
        "prompt": request.prompt, "target": request.target, "subject": request.subject, "task": request.task,
        "slots": dict(request.slots), "rephrase": case.paraphrases, "neighbours": case.neighbours, "ask": case.ask,
    }  # fmt: skip
    return {name: value for name, value in record.items() if value}
