"""Loading of a task's split as edit records, with a report of what was read."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from instructedit import registry
from instructedit.errors import UserError
from instructedit.records import EditRecord
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.folder import TaskFolder
from instructedit.tasks.raw import Raw
from instructedit.tasks.slices import part_of, split_and_part
from instructedit.tasks.sources import read_source

PACKAGE = "instructedit.tasks"
_TASK: type[Task] = Task


def load_records(
    task: str | Task, source: str | None = None, split: str = "train", **options: Any
) -> tuple[list[EditRecord], LoadReport]:
    """Reads one split of a dataset as edit records.

    Args:
        task: A task's name, the path of a folder with a ``task.yaml``, or a task.
        source: "tiny" (the embedded data); a local .json, .jsonl or .csv file, plain or packed as .gz or .xz; a local
            folder with one such file for the split; a dataset's ``owner/name`` on the hub. By default what the task's
            own folder holds, or the embedded data.
        split: "train", "val" or "test", or a part of one, such as ``train[:80%]`` or ``test[-50:]``. A single file is
            read whole, whatever the split, except for the part.
        **options: Constructor options of the task, where it is given by name.

    Returns:
        The records in the order of the source, and the report of what was read, kept and left out.

    Raises:
        UserError: If the task is unknown, the source cannot be read, a record is not as the task expects, or no
            record is left.
    """
    asked = find_task(task, options)
    name, part = split_and_part(split)
    place, declared = asked.locate(source, name)
    found = read_source(asked.name, place, name, asked.lists)
    raws = [Raw(data, found.name, number) for number, data in enumerate(found.objects)]
    reader = asked.reader(raws)
    report = LoadReport(reader.name, found.name, name, read=len(raws), fingerprint=found.fingerprint)
    _count_unknown(raws, reader, report)
    records = part_of(part_of(reader.build(raws, report), declared), part)
    report.kept = len(records)
    if not records:
        raise UserError(f"no records left: {report}" + (f"; of these the part {declared}{part}" if raws else ""))
    return records, report


def _count_unknown(raws: Sequence[Raw], reader: Task, report: LoadReport) -> None:
    """Counts by name the fields that the reader does not know: a misspelt one would otherwise be lost silently."""
    if reader.fields:
        for raw in raws:
            for name in raw.data.keys() - set(reader.fields):
                report.note(f"field {name!r} that is not read")


def find_task(task: str | Task, options: dict[str, Any] | None = None) -> Task:
    """Creates a task from its name, or from the path of a folder with a ``task.yaml``.

    Raises:
        UserError: If there is no such task, or its options do not fit.
    """
    options = options or {}
    if isinstance(task, Task):
        if options:
            raise UserError(f"task {task.name!r}: options go to its constructor: {', '.join(options)}")
        return task
    if TaskFolder.is_one(task, registry.names(_TASK, PACKAGE)):
        if options:
            raise UserError(f"task {task!r}: options go to its task.yaml: {', '.join(options)}")
        return TaskFolder(task)
    made = registry.plugin(_TASK, PACKAGE, task)
    try:
        inspect.signature(made).bind(**options)
    except TypeError as error:
        raise UserError(f"task {task!r}: {error}") from error
    return made(**options)


def task_names() -> list[str]:
    """Lists the names of all tasks in alphabetical order."""
    return registry.names(_TASK, PACKAGE)


def task_name(task: str) -> str:
    """Returns a task's name in records and results, even if the path of its folder was given.

    Raises:
        UserError: If there is no such folder, or its ``task.yaml`` is wrong.
    """
    return TaskFolder(task).name if TaskFolder.is_one(task, task_names()) else task


def task_title(task: str) -> str:
    """Returns a task's title in tables and instructions.

    Raises:
        UserError: If there is no such task.
    """
    if TaskFolder.is_one(task, task_names()):
        return TaskFolder(task).title
    return registry.plugin(_TASK, PACKAGE, task).title
