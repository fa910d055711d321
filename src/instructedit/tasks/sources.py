"""Sources of raw records: the embedded data, a local file or folder, the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from instructedit.errors import UserError
from instructedit.tasks.csv_files import rows

_OPEN: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_LARGEST = 4 << 30  # bytes of an unpacked file: a small packed one can hold more than fits in memory
_DATA_FILE = re.compile(r"(?P<stem>.+)(?P<format>\.jsonl?|\.csv)(?P<packing>\.gz|\.xz|)", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_LISTED = 20  # names that an error lists: it stays one readable line


class Source(NamedTuple):
    """Records that were read: a name for messages, the sha256 of the bytes (or of the canonical JSON), the objects."""

    name: str
    fingerprint: str
    objects: list[dict[str, object]]


def is_hub_id(source: str) -> bool:
    """True if a source reads as ``owner/name`` on the hub, and not as a data file."""
    text = (".txt", ".txt.gz", ".txt.xz")
    return bool(_HUB_ID.fullmatch(source)) and not _DATA_FILE.fullmatch(source) and not source.lower().endswith(text)


def read_source(task: str, source: str, split: str, lists: Collection[str] = ()) -> Source:
    """Reads the raw records of one split.

    Args:
        task: Name of the task, which selects the embedded data ("tiny").
        source: "tiny"; a file (.json with a list, .jsonl, or .csv with a header, each also as .gz or .xz); a folder
            with one such file for the split; else ``owner/name`` on the hub.
        split: "train", "val" or "test". A single file is read whole, whatever the split.
        lists: Columns of a CSV file whose cells hold several texts.

    Raises:
        UserError: If there is nothing to read, or the content is not a list of objects.
    """
    if source == "tiny":
        from instructedit.testbed.datasets import raw_records

        return _canonical(source, raw_records(task, split))
    try:
        path = Path(source).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a folder that may not be entered; the home of an unknown user
        raise UserError(f"{source}: cannot be read: {_why(error)}") from error
    if is_there:
        return _read_file(_file_for(path, split) if is_folder else path, lists)
    if is_hub_id(source):
        return _read_hub(source, split)
    raise UserError(f"{source}: no such file or folder")


def _file_for(folder: Path, split: str) -> Path:
    """Finds the folder's one file for a split: named after it, else starting with it, else containing its name.

    A table (.csv) is used only if no other file fits.

    Raises:
        UserError: If no file fits, or several fit equally well.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {_why(error)}") from error
    stems = {name: match["stem"] for name in names if (match := _DATA_FILE.fullmatch(name))}
    # A split's name counts where a word starts: "eval" is not "val".
    word = re.compile(rf"(?<![A-Za-z]){re.escape(split)}", re.IGNORECASE)
    found: list[str] = []
    for table in (False, True):
        for fits in (split.__eq__, word.match, word.search):
            found = found or [n for n, stem in stems.items() if fits(stem) and (".csv" in n.lower()) is table]
    if len(found) != 1:
        problem = f"more than one file for split {split!r}" if found else f"no file for split {split!r}"
        listed = ", ".join((found or names)[:_LISTED]) + (", ..." if len(found or names) > _LISTED else "")
        raise UserError(f"{folder}: {problem}; there is: {listed or 'nothing'}")
    return folder / found[0]


def _read_file(path: Path, lists: Collection[str] = ()) -> Source:
    match = _DATA_FILE.fullmatch(path.name)
    if not match:
        raise UserError(f"{path}: not a .json or .jsonl file, nor a .csv (nor one of these as .gz or .xz)")
    try:
        content = path.read_bytes()
        with _OPEN[match["packing"].lower()](path, "rb") as opened:
            unpacked = opened.read(_LARGEST + 1)
        if len(unpacked) > _LARGEST:
            raise UserError(f"{path}: more than {_LARGEST >> 30} GiB unpacked: split it")
        text = unpacked.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {_why(error)}") from error
    parsed: object
    if match["format"].lower() == ".csv":
        parsed = rows(text, str(path), lists)
    elif match["format"].lower() == ".json":
        parsed = _parse(text, str(path))
    else:  # only \n ends a line: JSON texts may hold the other characters that str.splitlines splits at
        lines = enumerate(text.split("\n"), start=1)
        parsed = [_parse(line, str(path), number) for number, line in lines if line.strip()]
    return Source(str(path), hashlib.sha256(content).hexdigest(), _objects(parsed, str(path)))


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _parse(text: str, name: str, line: int = 1) -> object:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{name}: wrong JSON at {where}: {error.msg}") from error
    except _TwiceError as error:
        raise UserError(f"{name}: JSON from line {line}: field {str(error)!r} stands twice in one object") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested without end
        raise UserError(f"{name}: JSON from line {line} cannot be read: {error}") from error


class _TwiceError(ValueError):
    """Error that names a field that an object has twice, of which JSON readers keep only the last."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _objects(parsed: object, name: str) -> list[dict[str, object]]:
    if not isinstance(parsed, list):
        raise UserError(f"{name}: expected a list of objects, got {type(parsed).__name__}")
    for number, entry in enumerate(parsed):
        if not isinstance(entry, dict):
            raise UserError(f"{name}, record {number}: expected an object, got {type(entry).__name__}")
    return parsed


def _read_hub(name: str, split: str) -> Source:
    """Reads one split of a hub dataset as plain data: `datasets` runs no code of the repository."""
    import datasets

    try:
        try:
            rows = datasets.load_dataset(name, split=split)
        except ValueError:  # what datasets raises for a split that is not there
            if split != "val":
                raise
            rows = datasets.load_dataset(name, split="validation")
        return _canonical(name, list(rows))
    except Exception as error:  # the network, access, the format: the hub fails in many ways
        problem = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hub dataset {name!r}, split {split!r}: {problem} (no local file has that name)") from error


def _canonical(name: str, rows: Sequence[Mapping[str, object]]) -> Source:
    objects = [dict(row) for row in rows]
    text = json.dumps(objects, sort_keys=True, separators=(",", ":"), default=str)
    return Source(name, hashlib.sha256(text.encode("ascii")).hexdigest(), objects)
