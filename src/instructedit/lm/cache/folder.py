"""A cache folder as a whole: its partitions, their files and contents, eviction, and removal."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from instructedit.errors import UserError
from instructedit.lm.cache.shard import CorruptShard, Shard

FORMAT = 1
META, SHARD, PART = "meta.json", ".safetensors", ".part"
_ABANDONED = 3600.0  # seconds after which an unfinished file counts as abandoned
_OURS = re.compile(rf"\d+-\d+-[0-9a-f]{{8}}({SHARD}|{PART})|meta\.json(\.[0-9a-f]{{8}}{PART})?")
_PARTITION = re.compile(r"[0-9a-f]{32}")


def partition_name(about: Mapping[str, Any]) -> str:
    """Names the folder of a model (its fingerprint), block, forward pass and storage dtype (``at_rest``)."""
    wanted = {name: about[name] for name in ("model", "block", "forward", "at_rest")}
    return hashlib.sha256(json.dumps({"format": FORMAT, **wanted}, sort_keys=True).encode()).hexdigest()[:32]


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes ``meta.json`` for people and for `partitions`; states are found without it."""
    file = folder / META
    if read_meta(folder) == meta:
        return
    part = folder / f"{META}.{secrets.token_hex(4)}{PART}"
    part.write_text(json.dumps(meta, indent=2) + "\n")
    part.replace(file)


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads ``meta.json``; empty if it cannot be read."""
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


class _File(NamedTuple):
    used: float
    size: int
    path: Path


def _files(folders: Iterable[Path]) -> list[_File]:
    """Lists finished and unfinished shards, least recently used first; other processes may remove some meanwhile."""
    found = []
    for folder in folders:
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name != META and _OURS.fullmatch(entry.name):
                        stat = entry.stat(follow_symlinks=False)
                        found.append(_File(stat.st_mtime, stat.st_size, Path(entry.path)))
    return sorted(found)


def _partitions(root: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(path for path in root.iterdir() if _PARTITION.fullmatch(path.name) and path.is_dir())
    return []


def evict(root: Path, max_bytes: int) -> int:
    """Removes the least recently used shards until the rest fits in `max_bytes`; their readers may continue.

    Files that a killed process left unfinished are removed too, an hour later.

    Returns:
        Bytes that were removed.
    """
    files = _files(_partitions(root))
    left = before = sum(file.size for file in files)
    for file in files:
        unfinished = file.path.suffix == PART
        if time.time() - file.used > _ABANDONED if unfinished else left > max_bytes:
            with suppress(OSError):  # a file of another user
                file.path.unlink(missing_ok=True)
                left -= file.size
    return before - left


@dataclass(frozen=True)
class ListedPartition:
    """A partition on disk, and what it holds.

    Attributes:
        folder: Folder of the partition.
        meta: Contents of ``meta.json``; empty if it cannot be read.
        rows: Rows in whole shards; a row that two processes wrote at once counts twice.
        bytes: Total size of its files.
        used: Time of the last use, in seconds since 1970; 0 if it holds nothing.
        corrupt: Shards that cannot be used.
    """

    folder: Path
    meta: dict[str, Any]
    rows: int
    bytes: int
    used: float
    corrupt: int


def partitions(root: Path) -> list[ListedPartition]:
    """Lists the partitions of a cache folder and what they hold; nothing is changed."""
    found = []
    for folder in _partitions(root):
        files, rows, corrupt = _files([folder]), 0, 0
        for file in files:
            try:
                rows += len(Shard(file.path)) if file.path.suffix == SHARD else 0
            except (CorruptShard, OSError):
                corrupt += 1
        used = max((file.used for file in files), default=0.0)
        found.append(ListedPartition(folder, read_meta(folder), rows, sum(f.size for f in files), used, corrupt))
    return found


def clear(root: Path, lm: str | None = None) -> list[ListedPartition]:
    """Removes the partitions of a cache folder, or those of one LM.

    Args:
        root: The cache folder.
        lm: Name of the LM whose partitions are removed; all by default.

    Returns:
        The removed partitions.

    Raises:
        UserError: If the folder holds anything that no cache wrote; then nothing is removed.
    """
    if (foreign := next(_foreign(root), None)) is not None:
        raise UserError(f"{root}: not cleared, since {foreign} is no part of a prefix cache")
    gone = [partition for partition in partitions(root) if lm is None or partition.meta.get("lm") == lm]
    for partition in gone:
        for path in (*(file.path for file in _files([partition.folder])), partition.folder / META):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a process writes there now
            partition.folder.rmdir()
    return gone


def _foreign(root: Path) -> Iterator[Path]:
    """Yields the paths in a cache folder that no prefix cache has written."""
    if root.exists() and not root.is_dir():
        yield root
        return
    for path in sorted(root.iterdir()) if root.exists() else ():
        if not _PARTITION.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            yield path
            continue
        for file in sorted(path.iterdir()):
            if not _OURS.fullmatch(file.name) or file.is_symlink() or not file.is_file():
                yield file
