"""What every task shares: how raw records become edit records, and the account of what was left out."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from instructedit import registry
from instructedit.errors import UserError
from instructedit.records import EditRecord
from instructedit.tasks.raw import Raw
from instructedit.tasks.sources import read_source

_PACKAGE = "instructedit.tasks"


@dataclass
class LoadReport:
    """What a reader did with a dataset: nothing is left out without being counted here.

    Attributes:
        task: Name of the task.
        source: The file or the hub id that was read, or "tiny".
        split: The split's name.
        read: Number of raw records.
        kept: Number of edit records made of them.
        dropped: How many records, probes and answers were left out, by reason.
        noted: What is odd but kept, by remark.
        fingerprint: sha256 (hex) of the file's bytes, or of the records' canonical JSON where there is no file.
    """

    task: str
    source: str
    split: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts something that was left out."""
        if count:
            self.dropped[reason] += count

    def note(self, remark: str, count: int = 1) -> None:
        """Counts something that is odd but stays."""
        if count:
            self.noted[remark] += count

    def record_id(self, raw: Raw) -> str:
        """``<task>/<split>/<number>``: stable, since it counts what was read and not what was kept."""
        return f"{self.task}/{self.split}/{raw.number}"

    def line(self) -> str:
        """The whole account in one line."""
        parts = [f"{self.task} {self.split} from {self.source}: {self.read} records read, {self.kept} edits kept"]
        for verb, counts in (("dropped", self.dropped), ("noted", self.noted)):
            if counts:
                parts.append(f"{verb}: " + ", ".join(f"{what} ({n})" for what, n in counts.most_common()))
        return "; ".join([*parts, f"sha256 {self.fingerprint[:12]}"])

    def __str__(self) -> str:
        """As `line`."""
        return self.line()


class Task(ABC):
    """Reads one dataset format. A subclass with a ``name`` in a module of this folder is all that a new task needs.

    Options of a task are keyword arguments of its constructor, with defaults.

    Attributes:
        name: The task's name in the registry and in record ids, lower case.
        title: The task's name as it stands in an instruction.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """The edit records of one raw record; what is left out is counted in `report`."""

    def build(self, raws: Sequence[Raw], report: LoadReport) -> list[EditRecord]:
        """The edit records of a whole split: those of each raw record, an edit that comes again left out."""
        records: dict[tuple[str, str], EditRecord] = {}
        for raw in raws:
            for record in self.parse(raw, report):
                first = records.setdefault((record.request.prompt, record.request.target), record)
                if first is not record:
                    report.drop("duplicate edit")
        return list(records.values())


_TASK: type[Task] = Task


def load_records(
    task: str | Task, source: str = "tiny", split: str = "train", **options: Any
) -> tuple[list[EditRecord], LoadReport]:
    """Reads one split of a dataset.

    Args:
        task: A task's name, or a task.
        source: "tiny" (the embedded data); a local .json or .jsonl file, plain or packed as .gz or .xz; a local folder
            with one such file for the split; a dataset's ``owner/name`` on the hub.
        split: "train", "val" or "test".
        **options: Constructor options of the task, where it is given by name.

    Returns:
        The records in the order of the source, and the report of what was read, kept and left out.

    Raises:
        UserError: If the task is unknown, the source cannot be read, a record is not as the task expects, or no
            record is left.
    """
    reader = _reader(task, options)
    found = read_source(reader.name, source, split)
    raws = [Raw(data, found.name, number) for number, data in enumerate(found.objects)]
    report = LoadReport(reader.name, found.name, split, read=len(raws), fingerprint=found.fingerprint)
    records = reader.build(raws, report)
    report.kept = len(records)
    if not records:
        raise UserError(f"no records left: {report}")
    return records, report


def task_names() -> list[str]:
    """The names of all tasks, in alphabetical order."""
    return list(registry.plugins(_TASK, _PACKAGE))


def _reader(task: str | Task, options: dict[str, Any]) -> Task:
    if isinstance(task, Task):
        if options:
            raise UserError(f"task {task.name!r}: options go to its constructor: {', '.join(options)}")
        return task
    made = registry.plugin(_TASK, _PACKAGE, task)
    try:
        inspect.signature(made).bind(**options)
    except TypeError as error:
        raise UserError(f"task {task!r}: {error}") from error
    return made(**options)


def task_title(name: str) -> str:
    """What a task is called in tables and instructions.

    Raises:
        UserError: If there is no such task.
    """
    return registry.plugin(_TASK, _PACKAGE, name).title
