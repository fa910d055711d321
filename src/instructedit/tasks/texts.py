"""Plain texts to measure a model on: the embedded corpus, a local file, the hub; streamed, never read whole."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from instructedit.errors import UserError
from instructedit.tasks.sources import is_hub_id

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


def read_texts(source: str = "tiny") -> Iterator[str]:
    """Streams the texts of a source, one after the other.

    Args:
        source: "tiny" (the embedded corpus, in words drawn with seed 0); a file of plain text, where blank lines
            separate the texts; a .jsonl file whose objects have a field ``text``; each also as .gz or .xz; else a
            dataset's ``owner/name`` on the hub, whose records have such a field.

    Raises:
        UserError: If there is nothing to read, or a line is not such an object; it names the file and the line.
    """
    if source == "tiny":
        from instructedit.testbed.corpus import documents

        return documents(seed=0, passes=10)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if is_hub_id(source):
        return _read_hub(source)
    raise UserError(f"{source}: no such file of text")


def _read_file(path: Path) -> Iterator[str]:
    packed = path.suffix.lower() in _OPEN
    lines_of = _jsonl if ".jsonl" in [suffix.lower() for suffix in path.suffixes[-2:]] else _paragraphs
    try:
        with _OPEN.get(path.suffix.lower(), open)(path, "rt" if packed else "r", encoding="utf-8-sig") as lines:
            yield from lines_of(lines, path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _paragraphs(lines: Iterator[str], path: Path) -> Iterator[str]:
    part: list[str] = []
    for line in lines:
        if line.strip():
            part.append(line)
        elif part:
            yield "".join(part)
            part = []
    if part:
        yield "".join(part)


def _jsonl(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            text = found["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: expected an object with a field 'text' ({error!r})") from error
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: field 'text' is no string")
        yield text


def _read_hub(repo_id: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        for record in load_dataset(repo_id, split="train", streaming=True):
            yield record["text"]
    except Exception as error:  # the hub's client raises many kinds of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{repo_id}: no texts to be had from the hub: {reason}") from error
