"""A partition: the rows of states of one model and block on disk, and those that are buffered for it."""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instructedit.errors import UserError
from instructedit.lm.cache.folder import FORMAT, PART, SHARD, evict, partition_name, write_meta
from instructedit.lm.cache.shard import STORAGE_DTYPES, CorruptShard, Shard, dtype_name, packed

#: A shard is written when this many bytes are buffered, or after this many seconds.
SHARD_BYTES, SHARD_SECONDS = 64 << 20, 60.0


@dataclass
class Buffer:
    """Rows that are not on disk yet, in the storage dtype, on the CPU."""

    rows: dict[bytes, Tensor] = field(default_factory=dict)
    computed: torch.dtype = torch.float32
    size: int = 0
    since: float = 0.0

    def add(self, rows: Mapping[bytes, Tensor], computed: torch.dtype) -> None:
        """Adds rows, which were computed in the dtype `computed`."""
        self.since = self.since if self.rows else time.monotonic()
        sizes = [len(row) for row in rows.values()]
        flat = torch.cat(list(rows.values())).cpu()  # one transfer from the device
        self.rows |= dict(zip(rows, flat.split(sizes), strict=True))
        self.computed = computed
        self.size += flat.nbytes


class Partition:
    """The rows of one model, block, forward pass and storage dtype.

    Args:
        root: The cache folder.
        max_bytes: Maximum total size of all shards in it.
        about: Its ``lm``, ``model``, ``block``, ``forward``, and ``at_rest`` (the storage dtype).
    """

    def __init__(self, root: Path, max_bytes: int, about: dict[str, Any]) -> None:
        self.folder = root / partition_name(about)
        self._max_bytes, self._about = max_bytes, about
        self._dtype = STORAGE_DTYPES[about["at_rest"]]
        self._where: dict[bytes, tuple[Shard, int]] = {}
        self._shards: dict[str, Shard] = {}
        self._buffer = Buffer()
        self._enough = min(SHARD_BYTES, max_bytes // 8)  # so that evicting a shard loses little
        self._scanned = -1
        self.broken = False  # by a full or read-only disk: nothing more is written
        self.written = self.evicted = 0  # bytes

    def __contains__(self, key: bytes) -> bool:
        if key not in self._where and key not in self._buffer.rows:
            self._scan()
        return key in self._where or key in self._buffer.rows

    def find(self, keys: Sequence[bytes], device: torch.device) -> dict[bytes, Tensor]:
        """Returns the rows that are there, each [tokens, hidden] on the device in the dtype they were computed in."""
        if not all(key in self._where or key in self._buffer.rows for key in keys):
            self._scan()
        found: dict[bytes, Tensor] = {}
        for key in keys:
            if key in self._buffer.rows:
                found[key] = self._buffer.rows[key].to(device, self._buffer.computed, copy=True)
            elif key in self._where:
                shard, number = self._where[key]
                try:
                    found[key] = shard.row(number).to(device, shard.computed, copy=True)
                except CorruptShard as error:
                    self._drop(shard.file, error)
        return found

    def add(self, rows: Mapping[bytes, Tensor]) -> dict[bytes, Tensor]:
        """Adds rows, each [tokens, hidden]; they are buffered, and written many at once.

        Returns:
            The rows as they will be read back, so that results do not depend on whether a row was there before.

        Raises:
            UserError: If a state is too large for the storage dtype.
        """
        computed = next(iter(rows.values())).dtype
        stored = {key: row.to(self._dtype or computed) for key, row in rows.items()}
        for key, row in stored.items():
            if row.dtype is torch.float16 and not row.isfinite().all() and rows[key].isfinite().all():
                raise UserError("cache_dtype float16: some hidden states are larger than it can hold; use bfloat16")
        if not self.broken:
            self._buffer.add(stored, computed)
            if self._buffer.size >= self._enough or time.monotonic() - self._buffer.since > SHARD_SECONDS:
                self.flush()
        return {key: row.to(computed) for key, row in stored.items()}

    def flush(self) -> None:
        """Writes the buffered rows as one shard; a disk that takes no more ends the writing, not the run."""
        buffer, self._buffer = self._buffer, Buffer()
        if not buffer.rows:
            return
        try:
            for again in (True, False):
                try:
                    file = self._publish(buffer)
                    break
                except FileNotFoundError:  # another process has just cleared the folder
                    if not again:
                        raise
        except OSError as error:
            self.broken = True
            warnings.warn(f"{self.folder}: no more states are written ({error.strerror or error})", stacklevel=2)
            return
        self._open(file)
        self.written += buffer.size
        self.evicted += evict(self.folder.parent, self._max_bytes)

    def _publish(self, buffer: Buffer) -> Path:
        name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        sample = next(iter(buffer.rows.values()))
        size = sample.shape[-1]
        kept = {"dtype": dtype_name(sample.dtype), "hidden": size, "bytes_per_token": size * sample.element_size()}
        write_meta(self.folder, {"format": FORMAT, **self._about, **kept})
        part, file = self.folder / (name + PART), self.folder / (name + SHARD)
        try:
            part.write_bytes(packed(buffer.rows, buffer.computed, self.folder.name))
            part.replace(file)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return file

    def _scan(self) -> None:
        """Finds the shards that other processes have written, and forgets those that they have evicted."""
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._scanned:
                return
            names = {name for name in os.listdir(self.folder) if name.endswith(SHARD)}
        except FileNotFoundError:
            changed, names = -1, set()
        self._scanned = changed
        for name in self._shards.keys() - names:
            self._forget(name)
        for name in sorted(names - self._shards.keys()):
            self._open(self.folder / name)

    def _open(self, file: Path) -> None:
        try:
            shard = Shard(file)
        except FileNotFoundError:  # evicted meanwhile
            return
        except CorruptShard as error:
            self._drop(file, error)
            return
        except OSError as error:
            warnings.warn(f"{file}: cannot be read ({error.strerror or error}); left out", stacklevel=2)
            return
        self._shards[file.name] = shard
        self._where.update({key: (shard, number) for number, key in enumerate(shard)})

    def _drop(self, file: Path, error: CorruptShard) -> None:
        warnings.warn(f"{file}: corrupt ({error}); removed, its states are computed anew", stacklevel=2)
        self._forget(file.name)
        with suppress(OSError):
            file.unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        if shard := self._shards.pop(name, None):
            for key in shard:
                if key in self._where and self._where[key][0] is shard:
                    del self._where[key]
