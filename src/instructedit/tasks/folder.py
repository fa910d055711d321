"""A user's own task without Python code: a folder with a ``task.yaml`` and records in JSON, JSONL or CSV files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructedit import registry
from instructedit.configs import parsed, read_yaml
from instructedit.errors import UserError, unknown
from instructedit.instructions import InstructionBank, add_bank
from instructedit.records import EditRecord
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.flat import Flat
from instructedit.tasks.raw import Raw
from instructedit.tasks.slices import parted

FILE = "task.yaml"
#: The value of ``format:`` with which the format is recognised by the records' fields.
AUTO = "auto"
_PACKAGE = "instructedit.tasks"
_TASK: type[Task] = Task
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_SPLITS = ("train", "val", "test")
_LISTED = 12  # fields that an error lists: it stays one readable line


@dataclass(frozen=True)
class TaskFile:
    """Contents of a ``task.yaml``.

    Attributes:
        title: Title of the task in tables and instructions.
        name: Name of the task in results and record ids; the folder's name by default.
        format: The format of the records: that of a task, by its name (flat, counterfact, zsre, rome, …), or auto: it
            is recognised by the records' fields.
        fields: Names of the fields in the records, for the flat form: ``{prompt: question, target: [answer, a]}``.
        splits: Split → file, or a part of one: ``{train: "facts.csv[:80%]"}``; by default a file named after each.
        options: Options of the reader of this format.
        bank: File with the descriptions that instructions are made of; none by default.
    """

    title: str
    name: str | None = None
    format: str = AUTO
    fields: dict[str, str | list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    bank: str | None = None


class TaskFolder(Task):
    """Task that a folder's ``task.yaml`` defines; its bank of descriptions, if any, is found by the task's name.

    Args:
        path: The folder, or its ``task.yaml``.

    Raises:
        UserError: If there is no such file, or it breaks a rule; the message names the file and the key.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = _folder(path)
        self.file = self.folder / FILE
        if not self.file.is_file():
            raise UserError(f"{path}: no folder with a {FILE}; instructedit new-task {path} makes one")
        self.spec = parsed(TaskFile, read_yaml(self.file), str(self.file))
        self.name = self._checked_name()
        self.title = " ".join(self.spec.title.split()) or self.name
        self.flat = self._flat()
        self.lists = self.flat.lists
        self._check_keys()
        if self.spec.bank and self.spec.bank != "none":
            add_bank(self.name, InstructionBank.load(self.folder / self.spec.bank))

    @staticmethod
    def is_one(task: str, known: Sequence[str]) -> bool:
        """True if `task` is the path of a task's folder, and not a known name."""
        return task not in known and ("/" in task or (_folder(task) / FILE).is_file())

    def locate(self, source: str | None, split: str) -> tuple[str, str]:
        """Returns a split's file and the part of it that ``splits`` gives; without ``splits``, the folder."""
        if source is not None:
            return source, ""
        if not self.spec.splits:
            return str(self.folder), ""
        if split not in self.spec.splits:
            raise UserError(f"{self.file}: splits: there is no {split!r}, only: {', '.join(self.spec.splits)}")
        file, part = parted(self.spec.splits[split])
        return str(self.folder / file), part

    def reader(self, raws: Sequence[Raw]) -> Task:
        """Returns the reader of the records' format, under this task's name.

        Raises:
            UserError: If no format has the fields of the first record.
        """
        if self.spec.fields or not raws:
            return self.flat
        form = recognised(raws[0].data) if self.spec.format == AUTO else self.spec.format
        if form is None:
            names = ", ".join(list(raws[0].data)[:_LISTED]) or "none"
            raise raws[0].error(
                f"fields of no known format ({names}): {self.file} can say under 'fields:' which is which, "
                f"or under 'format:' which of {', '.join(registry.plugins(_TASK, _PACKAGE))} it is"
            )
        return self._with_options(registry.plugin(_TASK, _PACKAGE, form)).reader(raws)

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the edits of one record with the reader of its format."""
        return self.reader([raw]).parse(raw, report)

    def _with_options(self, made: type[Task]) -> Task:
        try:
            return made(**self.spec.options).called(self.name, self.title)
        except TypeError as error:
            raise UserError(f"{self.file}: options: {error}") from error

    def _flat(self) -> Flat:
        try:
            flat = Flat(self.spec.fields)
        except UserError as error:
            raise UserError(f"{self.file}: fields: {error}") from error
        return flat.called(self.name, self.title)

    def _checked_name(self) -> str:
        name = self.spec.name or self.folder.resolve().name.lower()
        self.check_name(name, str(self.file))
        return name

    @staticmethod
    def check_name(name: str, where: str) -> None:
        """Checks that a name can be a task's, since results and metrics are called by it, and is not another task's.

        Raises:
            UserError: If the check fails; the message begins with `where`.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} cannot be a task's name: give 'name:' in a-z, 0-9, - and _")
        if name in (known := registry.names(_TASK, _PACKAGE)):
            raise UserError(f"{where}: there is a task {name!r} already: give another 'name:' than {', '.join(known)}")

    def _check_keys(self) -> None:
        for split in self.spec.splits:
            if split not in _SPLITS:
                raise UserError(f"{self.file}: splits: {unknown('split', split, _SPLITS)}")
        names = registry.names(_TASK, _PACKAGE)
        if self.spec.format not in (AUTO, *names):
            raise UserError(f"{self.file}: format: {unknown('format', self.spec.format, [AUTO, *names])}")
        if self.spec.fields and self.spec.format not in (AUTO, self.flat.FORMAT):
            raise UserError(f"{self.file}: fields: the format {self.spec.format!r} has its own: leave one of them out")


def recognised(data: Mapping[str, object]) -> str | None:
    """Returns the name of the task whose format a record has, judged by its fields; None if there is none."""
    readers = registry.plugins(_TASK, _PACKAGE)
    return next((name for name, reader in readers.items() if reader.recognises(data)), None)


def _folder(path: str | Path) -> Path:
    place = Path(path).expanduser()
    return place.parent if place.name == FILE else place
