"""A user's edit requests with further prompts to ask, from Python or from a file (JSON, JSONL or CSV)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from instructedit.errors import UserError, unknown
from instructedit.records import EditRecord, EditRequest
from instructedit.tasks import flat, load_records
from instructedit.tasks.folder import FILE as TASK_FILE
from instructedit.tasks.folder import recognised
from instructedit.tasks.raw import Raw
from instructedit.tasks.sources import read_source

#: Names that each field may have in a file; the first is the documented one, the others are those of public datasets.
FIELDS = {
    **{field: flat.FIELDS[field] for field in ("prompt", "target", "subject", "slots", "rephrase")},
    "task": ("task",),
    "neighbours": ("neighbours", *(name for name in flat.FIELDS["locality"] if name != "neighbours"), "loc"),
    "ask": ("ask", *flat.FIELDS["portability"]),
}
#: Fields of datasets that a report ignores; what the model answers before the edit is asked of the model itself.
UNUSED = {
    *(name for field in ("old", "locality_answer", "portability_answer") for name in flat.FIELDS[field]),
    *flat.UNUSED, "answers", "loc_ans",
}  # fmt: skip
_MENDS = "New Question"  # key of the portability prompt in MEND's data
_LISTS = tuple(name for field in ("rephrase", "neighbours", "ask") for name in FIELDS[field])


@dataclass(frozen=True)
class EditCase:
    """One request with the prompts that show what its edit did.

    Attributes:
        request: The edit.
        paraphrases: Prompts (here and below also a single text) that the target should answer, too; if there are none,
            some are drawn when the embedded facts know the request's relation.
        neighbours: Prompts whose answers should stay; if there are none, some are drawn.
        ask: Further prompts, whose answers are shown but not judged.
    """

    request: EditRequest
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("paraphrases", "neighbours", "ask"):
            object.__setattr__(self, name, prompts_of(getattr(self, name)))

    @classmethod
    def of(cls, given: EditRequest | EditRecord | EditCase) -> Self:
        """Converts a request, or a dataset's record with the prompts of its probes, to a case."""
        if isinstance(given, EditRequest):
            return cls(given)
        if isinstance(given, EditRecord):
            kinds = ("generalization", "locality", "portability")
            return cls(given.request, *(tuple(probe.prompt for probe in given.of(kind)) for kind in kinds))
        return cls(given.request, given.paraphrases, given.neighbours, given.ask)


def prompts_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """Returns prompts as a tuple; a single text is one prompt, not one for each of its characters."""
    return (given,) if isinstance(given, str) else tuple(given)


def read_cases(path: str | Path, task: str | None = None) -> list[EditCase]:
    """Reads requests from a file, or the test records of a task's folder.

    A record has ``prompt`` and ``target``, and may have ``subject``, ``task``, ``rephrase``, ``neighbours``, ``ask``
    (each of the last three one text or a list; in a CSV cell separated by ``|``) and ``slots``. The names of these
    fields in the flat form and in KnowEdit's, EasyEdit's and MEND's datasets are accepted as well, and so are files of
    ROME's CounterFact, MQuAKE, RippleEdits and ConvSent.

    Args:
        path: A ``.csv`` file with a header, a ``.json`` file with a list of objects, a ``.jsonl`` file, or a folder
            with a ``task.yaml``.
        task: The task of records that name none.

    Raises:
        UserError: If there is nothing to read, or a record lacks a field, or has an unknown one or one of the wrong
            type. The message names the file, the record (counted from 0) and the field.
    """
    file = Path(path).expanduser()
    if (file / TASK_FILE).is_file() or file.name == TASK_FILE:
        return _of_records(str(path), None)
    if not file.is_file():
        raise UserError(f"{path}: no such file of requests (.json, .jsonl or .csv)")
    records = read_source("requests", str(file), "", _LISTS).objects
    if records and not set(FIELDS["prompt"]) & set(records[0]) and (form := recognised(records[0])):
        return _of_records(form, str(file))
    cases = [_case(Raw(record, str(path), number), task) for number, record in enumerate(records)]
    if not cases:
        raise UserError(f"{path}: no requests in it")
    return cases


def _of_records(task: str, source: str | None) -> list[EditCase]:
    """Reads a dataset's test records as cases."""
    return [EditCase.of(record) for record in load_records(task, source, "test")[0]]


def _case(raw: Raw, task: str | None) -> EditCase:
    known = [name for names in FIELDS.values() for name in names]
    for name in raw.data:
        if name not in known and name not in UNUSED:
            raise raw.error(str(unknown("field", name, known)))
    request = EditRequest(
        raw.text(_name(raw, "prompt")), raw.text(_name(raw, "target")), raw.optional_text("task") or task,
        raw.optional_text("subject"), _slots(raw),
    )  # fmt: skip
    return EditCase(request, *(tuple(_prompts(raw, _name(raw, field))) for field in ("rephrase", "neighbours", "ask")))


def _name(raw: Raw, field: str) -> str:
    """Returns the name that the record uses for a field."""
    there = [name for name in FIELDS[field] if raw.has(name)]
    if len(there) > 1:
        raise raw.error(f"fields {there[0]!r} and {there[1]!r} mean the same: leave one out")
    return there[0] if there else field


def _prompts(raw: Raw, field: str) -> Iterator[str]:
    """Yields the prompts of a field: a text, a list of texts or of objects with a prompt, or groups of such objects."""
    value = raw.data.get(field)
    if value is None:
        return
    if isinstance(value, str):
        yield raw.text(field)
    elif isinstance(value, dict) and _MENDS in value:
        yield raw.child(field).text(_MENDS)
    elif isinstance(value, dict):
        yield from (flat.prompt_of(item) for items in raw.groups(field).values() for item in items)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from (flat.prompt_of(item) for item in raw.objects(field))
    else:
        for number, text in enumerate(raw.texts(field)):
            if not text:
                raise raw.error(f"field '{field}[{number}]' is empty")
            yield text


def _slots(raw: Raw) -> dict[str, str]:
    slots = raw.child("slots") if raw.has("slots") else None
    return {name: slots.text(name) for name in slots.data} if slots else {}
