"""Base class of tasks, which turn raw records into edit records, and the report of what was left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from instructedit.errors import UserError
from instructedit.records import EditRecord
from instructedit.tasks.raw import Raw


@dataclass
class LoadReport:
    """Report of what a reader did with a dataset: everything that is left out is counted here.

    Attributes:
        task: Name of the task.
        source: The file or the hub id that was read, or "tiny".
        split: The split's name.
        read: Number of raw records.
        kept: Number of edit records made of them.
        dropped: How many records, probes and answers were left out, by reason.
        noted: How many odd things were kept, by remark.
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
        """Returns the id ``<task>/<split>/<number>``: stable, since it counts what was read and not what was kept."""
        return f"{self.task}/{self.split}/{raw.number}"

    def line(self) -> str:
        """Returns the whole report in one line."""
        parts = [f"{self.task} {self.split} from {self.source}: {self.read} records read, {self.kept} edits kept"]
        for verb, counts in (("dropped", self.dropped), ("noted", self.noted)):
            if counts:
                parts.append(f"{verb}: " + ", ".join(f"{what} ({n})" for what, n in counts.most_common()))
        return "; ".join([*parts, f"sha256 {self.fingerprint[:12]}"])

    def __str__(self) -> str:
        """Returns the whole report in one line, like `line`."""
        return self.line()


class Task(ABC):
    """Base class of readers of a dataset format; a new task needs only a subclass with a ``name`` in this folder.

    Options of a task are keyword arguments of its constructor, with defaults.

    Attributes:
        name: The task's name in the registry and in record ids, lower case.
        title: The task's name as it stands in an instruction.
        fields: Names that the fields of its records may have; others are counted. Empty if the reader does not say.
        lists: The fields among them that hold several texts in one CSV cell.
    """

    name: str
    title: str
    fields: Collection[str] = ()
    lists: Collection[str] = ()

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if a record of unknown origin has this format, judged by its fields."""
        return False

    def locate(self, source: str | None, split: str) -> tuple[str, str]:
        """Returns the source of a split's records, and the part of it that they are (``[:80%]``, or empty for all)."""
        return source or "tiny", ""

    def reader(self, raws: Sequence[Raw]) -> Task:
        """Returns the task that reads these records: this one, unless the format is known only from the records."""
        return self

    def called(self, name: str, title: str) -> Self:
        """Gives this task another name and title, for a user's own dataset in its format."""
        self.name, self.title = name, title
        return self

    @abstractmethod
    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the edit records of one raw record; what is left out is counted in `report`."""

    def build(self, raws: Sequence[Raw], report: LoadReport) -> list[EditRecord]:
        """Makes the edit records of a whole split; an edit that occurs again is left out."""
        records: dict[tuple[str, str], EditRecord] = {}
        for raw in raws:
            for record in self._parsed(raw, report):
                first = records.setdefault((record.request.prompt, record.request.target), record)
                if first is not record:
                    report.drop("duplicate edit")
        return list(records.values())

    def _parsed(self, raw: Raw, report: LoadReport) -> Iterator[EditRecord]:
        """Parses one raw record; an error about a request or probe says which record it comes from."""
        try:
            yield from self.parse(raw, report)
        except UserError as error:
            raise raw.error(str(error)) from error
