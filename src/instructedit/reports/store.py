"""Edits that one keeps: a folder each, with the adapter, its report, its requests, and what tells the model it fits."""

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
    """Where edits are kept: the folder given, else $INSTRUCTEDIT_EDITS, else ``edits/`` in the working folder."""
    return Path(given or os.environ.get(STORE) or "edits").expanduser()


@dataclass(frozen=True)
class KeptEdit:
    """One edit in a folder.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def report(self) -> dict[str, Any]:
        """What `EditReport.to_dict` said when it was made.

        Raises:
            UserError: If it is damaged.
        """
        return self._read(REPORT)

    @property
    def model(self) -> dict[str, str]:
        """The model that it fits: its ``name``, what transformers loads it from, ``source``, and the ``fingerprint``.

        Raises:
            UserError: If it is damaged.
        """
        return self._read(MODEL)

    @property
    def cases(self) -> list[EditCase]:
        """Its requests, with all that was asked."""
        return read_cases(self.folder / REQUESTS)

    def load(self, lm: FrozenLM) -> Edit:
        """The edit.

        Raises:
            UserError: If it was made for another model, or is damaged.
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
    """Writes a report's only edit with all that belongs to it, into a folder that is there or not."""
    (edit,) = report.edits
    lm.save(edit, folder)
    report.save_json(folder / REPORT)
    model = {"name": lm.name, "source": lm.source, "fingerprint": report.fingerprint}
    for file, content in ((REQUESTS, [_record(each.case) for each in report.requests]), (MODEL, model)):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def keep(lm: FrozenLM, report: EditReport, name: str, store: Path) -> Path:
    """Keeps a report's only edit in a store, whole or not at all.

    Raises:
        UserError: If the name is none for a folder, or taken.
    """
    place = free_place(name, store)
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".") as folder:
        write_edit(lm, report, Path(folder, name))
        Path(folder, name).rename(place)
    return place


def free_place(name: str, store: Path) -> Path:
    """Where an edit of this name will be.

    Raises:
        UserError: If the name is none for a folder, or taken.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"{name!r} is no name for an edit: letters, digits and dashes, say")
    if (store / name).exists():
        raise UserError(f"{store}: there is an edit {name!r} already; undo it first, or take another name")
    return store / name


def kept_edits(store: Path) -> list[KeptEdit]:
    """The edits of a store by name."""
    return [KeptEdit(file.parent) for file in sorted(store.glob(f"[!.]*/{MODEL}")) if _is_kept(file.parent)]


def kept_edit(name: str, store: Path, anywhere: bool = True) -> KeptEdit:
    """An edit by its name in a store, or one in a folder anywhere.

    Raises:
        UserError: If there is none.
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
        UserError: If there is none of this name; a folder elsewhere is left alone.
    """
    folder = kept_edit(name, store, anywhere=False).folder
    shutil.rmtree(folder)
    return folder


def _is_kept(folder: Path) -> bool:
    return all((folder / file).is_file() for file in (MODEL, REPORT, REQUESTS, META))


def combined(edits: Sequence[Edit]) -> Edit:
    """One edit whose change of weights is the sum of several.

    Raises:
        UserError: If one is no change of weights.
    """
    for edit in edits:
        if not edit.is_weights or len(edit) != 1 or not edit.sites:
            raise UserError(f"an edit of the kind {edit.name!r} cannot be added to others")
    if all(isinstance(edit, LowRankEdit) for edit in edits):  # however many: a kept edit is an adapter
        return functools.reduce(LowRankEdit.plus, edits)  # type: ignore[arg-type]
    return functools.reduce(DenseEdit.plus, map(to_dense, edits))


def report_on(lm: FrozenLM, edit: Edit, cases: Sequence[EditCase], name: str, options: Mapping[str, Any]) -> EditReport:
    """Asks all cases of one edit that is there already."""
    reports = Judge(lm)(cases, edit)
    return EditReport(lm.name, weights_fingerprint(lm), name, options, True, "tiny", "", tuple(reports), (edit,))


def _record(case: EditCase) -> dict[str, Any]:
    """A case as `read_cases` reads it."""
    request = case.request
    record = {
        "prompt": request.prompt, "target": request.target, "subject": request.subject, "task": request.task,
        "slots": dict(request.slots), "rephrase": case.paraphrases, "neighbours": case.neighbours, "ask": case.ask,
    }  # fmt: skip
    return {name: value for name, value in record.items() if value}
