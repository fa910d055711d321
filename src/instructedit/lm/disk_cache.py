"""Prefix states on disk: files written whole or not at all, mapped for reading, the least lately used thrown out first.

A cache folder holds a shelf (a folder) for each model, block, manner of forward pass and dtype at rest, so that no
model ever meets another's states::

    <32 hex digits>/meta.json            what the shelf is of, to be read by people
    <32 hex digits>/<name>.safetensors   a segment: rows of states, with an index and checksums
    <32 hex digits>/<name>.part          a segment that is being written

Every process writes segments of its own and publishes each by a rename; nothing that is published ever changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from instructedit.errors import UserError

FORMAT = 1
META, SEGMENT, PART = "meta.json", ".safetensors", ".part"
#: At rest: the option → dtype; None is the dtype that the model computes in, so that nothing is lost.
STORAGE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: A segment is written when so many bytes wait, or after so many seconds.
SEGMENT_BYTES, SEGMENT_SECONDS = 64 << 20, 60.0
_KEY = 16  # bytes of a row's key
_TOUCH = 60.0  # seconds between two notes that a segment is in use
_ABANDONED = 3600.0  # seconds after which nobody is writing an unfinished file any more
_OURS = re.compile(rf"\d+-\d+-[0-9a-f]{{8}}({SEGMENT}|{PART})|meta\.json(\.[0-9a-f]{{8}}{PART})?")
_SHELF = re.compile(r"[0-9a-f]{32}")


class Damaged(Exception):  # noqa: N818 (told, not raised to the user)
    """A segment that is not what was written."""


def row_key(tokens: bytes) -> bytes:
    """The key of a row: a digest of its token ids (little-endian 64-bit numbers)."""
    return hashlib.blake2b(tokens, digest_size=_KEY).digest()


def shelf_name(about: Mapping[str, Any]) -> str:
    """Folder of the shelf of a model (its fingerprint), block, forward pass and dtype at rest."""
    wanted = {name: about[name] for name in ("model", "block", "forward", "at_rest")}
    return hashlib.sha256(json.dumps({"format": FORMAT, **wanted}, sort_keys=True).encode()).hexdigest()[:32]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Tells weights apart (sha256, hex) by the sum of all bits of each tensor: exact in any order, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        whole = len(flat) // 8 * 8
        digest.update(f"{name} {int(flat[:whole].view(torch.int64).sum())}".encode())
        digest.update(flat[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()


class DiskCache:
    """The states of one model on disk.

    Args:
        root: The cache folder; other models and processes may use it too.
        max_bytes: Room for all segments in it, of all models.
        at_rest: ``float32`` keeps the states exactly as they are computed; ``bfloat16`` and ``float16`` round them.
        model: Gives ``lm`` (a name) and ``model`` (a fingerprint); called once, when first needed.

    Raises:
        UserError: If there is no such dtype, no room, or the folder is a file.
    """

    def __init__(self, root: str | Path, max_bytes: int, at_rest: str, model: Callable[[], dict[str, str]]) -> None:
        if at_rest not in STORAGE_DTYPES:
            raise UserError(f"cache_dtype: {at_rest!r} is none of {', '.join(STORAGE_DTYPES)}")
        if max_bytes < 1:
            raise UserError(f"cache_disk_bytes must be positive, got {max_bytes}; without cache_dir nothing is kept")
        self.root = Path(root).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"cache_dir {self.root}: not a folder")
        self.max_bytes, self.at_rest = max_bytes, at_rest
        self._model = model
        self._facts: dict[str, str] = {}
        self._shelves: dict[tuple[str, int], Shelf] = {}
        weakref.finalize(self, _flush, self._shelves)  # what waits is written when the model goes, or the process ends

    def shelf(self, forward: str, block: int) -> Shelf:
        """Where the states that enter a block are.

        Args:
            forward: What beside the model decides the numbers: the device, the precision of its products.
            block: Number of the block.
        """
        if (forward, block) not in self._shelves:
            self._facts = self._facts or self._model()
            about = {**self._facts, "block": block, "forward": forward, "at_rest": self.at_rest}
            self._shelves[forward, block] = Shelf(self.root, self.max_bytes, about)
        return self._shelves[forward, block]

    def flush(self) -> None:
        """Writes what waits."""
        _flush(self._shelves)

    @property
    def written(self) -> int:
        """Bytes that this process has written."""
        return sum(shelf.written for shelf in self._shelves.values())

    @property
    def evicted(self) -> int:
        """Bytes that it has thrown out to keep to the bound."""
        return sum(shelf.evicted for shelf in self._shelves.values())

    @property
    def broken(self) -> bool:
        """Whether the disk has refused to take more."""
        return any(shelf.broken for shelf in self._shelves.values())


def _flush(shelves: Mapping[Any, Shelf]) -> None:
    for shelf in shelves.values():
        shelf.flush()


class Shelf:
    """The rows of one model, block, forward pass and dtype at rest.

    Args:
        root: The cache folder.
        max_bytes: Room for all segments in it.
        about: ``lm``, ``model``, ``block``, ``forward``, ``at_rest``.
    """

    def __init__(self, root: Path, max_bytes: int, about: dict[str, Any]) -> None:
        self.folder = root / shelf_name(about)
        self._max_bytes, self._about = max_bytes, about
        self._dtype = STORAGE_DTYPES[about["at_rest"]]
        self._where: dict[bytes, tuple[_Segment, int]] = {}
        self._segments: dict[str, _Segment] = {}
        self._waiting = _Waiting()
        self._enough = min(SEGMENT_BYTES, max_bytes // 8)  # so that little goes when a segment does
        self._scanned = -1
        self.broken = False  # by a full or read-only disk: nothing more is written
        self.written = self.evicted = 0  # bytes

    def __contains__(self, key: bytes) -> bool:
        if key not in self._where and key not in self._waiting.rows:
            self._scan()
        return key in self._where or key in self._waiting.rows

    def find(self, keys: Sequence[bytes], device: torch.device) -> dict[bytes, Tensor]:
        """The rows that are there, each [tokens, hidden] on the device in the dtype that they were computed in."""
        if not all(key in self._where or key in self._waiting.rows for key in keys):
            self._scan()
        found: dict[bytes, Tensor] = {}
        for key in keys:
            if key in self._waiting.rows:
                found[key] = self._waiting.rows[key].to(device, self._waiting.computed, copy=True)
            elif key in self._where:
                segment, number = self._where[key]
                try:
                    found[key] = segment.row(number).to(device, segment.computed, copy=True)
                except Damaged as error:
                    self._drop(segment.file, error)
        return found

    def add(self, rows: Mapping[bytes, Tensor]) -> dict[bytes, Tensor]:
        """Takes rows, each [tokens, hidden]; they are written later, many at once.

        Returns:
            The same rows as they will be read: results do not depend on whether a row was there before.

        Raises:
            UserError: If a state is too large for the dtype at rest.
        """
        computed = next(iter(rows.values())).dtype
        rest = {key: row.to(self._dtype or computed) for key, row in rows.items()}
        for key, row in rest.items():
            if row.dtype is torch.float16 and not row.isfinite().all() and rows[key].isfinite().all():
                raise UserError("cache_dtype float16: some hidden states are larger than it can hold; use bfloat16")
        if not self.broken:
            self._waiting.add(rest, computed)
            if self._waiting.size >= self._enough or time.monotonic() - self._waiting.since > SEGMENT_SECONDS:
                self.flush()
        return {key: row.to(computed) for key, row in rest.items()}

    def flush(self) -> None:
        """Writes the rows that wait as one segment. A disk that takes no more ends the writing, not the run."""
        waiting, self._waiting = self._waiting, _Waiting()
        if not waiting.rows:
            return
        try:
            for again in (True, False):
                try:
                    file = self._publish(waiting)
                    break
                except FileNotFoundError:  # another process has just cleared the folder
                    if not again:
                        raise
        except OSError as error:
            self.broken = True
            warnings.warn(f"{self.folder}: no more states are written ({error.strerror or error})", stacklevel=2)
            return
        self._open(file)
        self.written += waiting.size
        self.evicted += evict(self.folder.parent, self._max_bytes)

    def _publish(self, waiting: _Waiting) -> Path:
        name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        sample = next(iter(waiting.rows.values()))
        size = sample.shape[-1]
        kept = {"dtype": _name(sample.dtype), "hidden": size, "bytes_per_token": size * sample.element_size()}
        _write_meta(self.folder, {"format": FORMAT, **self._about, **kept})
        part, file = self.folder / (name + PART), self.folder / (name + SEGMENT)
        try:
            part.write_bytes(_packed(waiting, self.folder.name))
            part.replace(file)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return file

    def _scan(self) -> None:
        """Finds what other processes have written, and lets go of what they have thrown out."""
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._scanned:
                return
            names = {name for name in os.listdir(self.folder) if name.endswith(SEGMENT)}
        except FileNotFoundError:
            changed, names = -1, set()
        self._scanned = changed
        for name in self._segments.keys() - names:
            self._forget(name)
        for name in sorted(names - self._segments.keys()):
            self._open(self.folder / name)

    def _open(self, file: Path) -> None:
        try:
            segment = _Segment(file)
        except FileNotFoundError:  # thrown out since
            return
        except Damaged as error:
            self._drop(file, error)
            return
        except OSError as error:
            warnings.warn(f"{file}: cannot be read ({error.strerror or error}); left out", stacklevel=2)
            return
        self._segments[file.name] = segment
        self._where.update({key: (segment, number) for number, key in enumerate(segment)})

    def _drop(self, file: Path, error: Damaged) -> None:
        warnings.warn(f"{file}: damaged ({error}); removed, its states are computed anew", stacklevel=2)
        self._forget(file.name)
        with suppress(OSError):
            file.unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        if segment := self._segments.pop(name, None):
            for key in segment:
                if key in self._where and self._where[key][0] is segment:
                    del self._where[key]


@dataclass
class _Waiting:
    """Rows that are not on disk yet, at rest, on the CPU."""

    rows: dict[bytes, Tensor] = field(default_factory=dict)
    computed: torch.dtype = torch.float32
    size: int = 0
    since: float = 0.0

    def add(self, rows: Mapping[bytes, Tensor], computed: torch.dtype) -> None:
        self.since = self.since if self.rows else time.monotonic()
        sizes = [len(row) for row in rows.values()]
        flat = torch.cat(list(rows.values())).cpu()  # one transfer from the device
        self.rows |= dict(zip(rows, flat.split(sizes), strict=True))
        self.computed = computed
        self.size += flat.nbytes


class _Segment:
    """A published file, mapped. It may be unlinked while it is: what is mapped stays.

    Raises:
        Damaged: If it is not what was written; of its states, that shows only when a row is read.
        OSError: If it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb"):  # plain errors for what is no damage
                pass
            mapped = safe_open(file, "pt")
            about = mapped.metadata() or {}
            self._keys, self._ends, self._sums = (mapped.get_tensor(n) for n in ("keys", "ends", "sums"))
            self._states = mapped.get_tensor("states")
            kind = f"{file.parent.name} {self._states.dtype} {about['computed']}"
            if about.get("index") != _index_sum(kind, self._keys, self._ends, self._sums):
                raise Damaged("its index fails the checksum")
            self.computed: torch.dtype = getattr(torch, about["computed"])
        except (SafetensorError, KeyError, AttributeError) as error:
            raise Damaged(" ".join(str(error).split())) from error
        self._checked = torch.zeros(len(self._ends), dtype=torch.bool)
        self._touched = 0.0

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[bytes]:
        """The keys of its rows, in order."""
        raw = self._keys.numpy().tobytes()
        return (raw[i : i + _KEY] for i in range(0, len(raw), _KEY))

    def row(self, number: int) -> Tensor:
        """The states of a row, [tokens, hidden]: a view of the mapped file.

        Raises:
            Damaged: If they are not what was written.
        """
        start = int(self._ends[number - 1]) if number else 0
        states = self._states[start : int(self._ends[number])]
        if not self._checked[number]:
            if _crc(states) != int(self._sums[number]):
                raise Damaged(f"row {number} fails its checksum")
            self._checked[number] = True
        if time.monotonic() - self._touched > _TOUCH:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.file)
        return states


def _packed(waiting: _Waiting, shelf: str) -> bytes:
    """A segment's bytes; safetensors checks on its own that a file has its full length."""
    rows = list(waiting.rows.values())
    keys = torch.frombuffer(bytearray(b"".join(waiting.rows)), dtype=torch.uint8).reshape(-1, _KEY)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    sums = torch.tensor([_crc(row) for row in rows])
    computed = _name(waiting.computed)
    kind = f"{shelf} {rows[0].dtype} {computed}"
    about = {"computed": computed, "index": _index_sum(kind, keys, ends, sums)}
    return save({"states": torch.cat(rows), "keys": keys, "ends": ends, "sums": sums}, about)


def _index_sum(kind: str, *index: Tensor) -> str:
    """Checksum of everything in a segment but the states themselves; `kind` tells its shelf and dtypes."""
    digest = hashlib.sha256(kind.encode())
    for tensor in index:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _crc(states: Tensor) -> int:
    return zlib.crc32(states.contiguous().view(torch.uint8).numpy().data)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Only to be read by people and by `shelves`: states are found without it."""
    file = folder / META
    if _read_meta(folder).keys() == meta.keys():
        return
    part = folder / f"{META}.{secrets.token_hex(4)}{PART}"
    part.write_text(json.dumps(meta, indent=2) + "\n")
    part.replace(file)


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


# -- the folder as a whole --------------------------------------------------------------------------------------------


class _File(NamedTuple):
    used: float
    size: int
    path: Path


def _files(folders: Iterable[Path]) -> list[_File]:
    """Segments and unfinished ones, the least lately used first; other processes may remove some meanwhile."""
    found = []
    for folder in folders:
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name != META and _OURS.fullmatch(entry.name):
                        stat = entry.stat(follow_symlinks=False)
                        found.append(_File(stat.st_mtime, stat.st_size, Path(entry.path)))
    return sorted(found)


def _shelf_folders(root: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(path for path in root.iterdir() if _SHELF.fullmatch(path.name) and path.is_dir())
    return []


def evict(root: Path, max_bytes: int) -> int:
    """Removes the segments that were used least lately until the rest keeps to the bound; whoever reads them may go on.

    Files that a killed process left unfinished go too, an hour later.

    Returns:
        Bytes that were removed.
    """
    files = _files(_shelf_folders(root))
    left = before = sum(file.size for file in files)
    for file in files:
        unfinished = file.path.suffix == PART
        if time.time() - file.used > _ABANDONED if unfinished else left > max_bytes:
            with suppress(OSError):  # another user's
                file.path.unlink(missing_ok=True)
                left -= file.size
    return before - left


@dataclass(frozen=True)
class Listed:
    """What a shelf holds.

    Attributes:
        folder: Where it is.
        meta: What ``meta.json`` says; empty if it cannot be read.
        rows: Rows in whole segments; a row that two processes wrote at once counts twice.
        bytes: Of all its files.
        used: Time of the last use, in seconds since 1970; 0 if it holds nothing.
        damaged: Segments that cannot be used.
    """

    folder: Path
    meta: dict[str, Any]
    rows: int
    bytes: int
    used: float
    damaged: int


def shelves(root: Path) -> list[Listed]:
    """What a cache folder holds, shelf by shelf; nothing there is changed."""
    found = []
    for folder in _shelf_folders(root):
        files, rows, damaged = _files([folder]), 0, 0
        for file in files:
            try:
                rows += len(_Segment(file.path)) if file.path.suffix == SEGMENT else 0
            except (Damaged, OSError):
                damaged += 1
        used = max((file.used for file in files), default=0.0)
        found.append(Listed(folder, _read_meta(folder), rows, sum(f.size for f in files), used, damaged))
    return found


def clear(root: Path, lm: str | None = None) -> list[Listed]:
    """Removes the shelves of a cache folder, or those of one LM.

    Args:
        root: The cache folder.
        lm: Name of the LM whose shelves go; all by default.

    Returns:
        What was removed.

    Raises:
        UserError: If the folder holds anything that no cache wrote; then nothing is removed.
    """
    if (foreign := next(_foreign(root), None)) is not None:
        raise UserError(f"{root}: not cleared, since {foreign} is no part of a prefix cache")
    gone = [shelf for shelf in shelves(root) if lm is None or shelf.meta.get("lm") == lm]
    for shelf in gone:
        for path in (*(file.path for file in _files([shelf.folder])), shelf.folder / META):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a process writes there now
            shelf.folder.rmdir()
    return gone


def _foreign(root: Path) -> Iterator[Path]:
    """What is in a folder that this module does not write there."""
    if root.exists() and not root.is_dir():
        yield root
        return
    for path in sorted(root.iterdir()) if root.exists() else ():
        if not _SHELF.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            yield path
            continue
        for file in sorted(path.iterdir()):
            if not _OURS.fullmatch(file.name) or file.is_symlink() or not file.is_file():
                yield file
