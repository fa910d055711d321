"""A shard: a published file of rows of states, with an index and checksums, mapped for reading."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

#: Dtypes in which states are stored: option → dtype; None is the dtype that they are computed in, so that nothing is
#: lost.
STORAGE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEY_BYTES = 16  # of a row's key
_TOUCH = 60.0  # seconds between two updates of a shard's time of use


class CorruptShard(Exception):  # noqa: N818 (caught here, never shown to the user)
    """A shard that differs from what was written."""


def row_key(tokens: bytes) -> bytes:
    """Returns the key of a row: a digest of its token ids (little-endian 64-bit numbers)."""
    return hashlib.blake2b(tokens, digest_size=KEY_BYTES).digest()


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without its module: ``float32``."""
    return str(dtype).removeprefix("torch.")


class Shard:
    """A published file of rows, mapped for reading; it may be unlinked meanwhile, since the mapping stays valid.

    Raises:
        CorruptShard: If it differs from what was written; for its states, that shows only when a row is read.
        OSError: If it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb"):  # plain errors for a file that is not corrupt
                pass
            mapped = safe_open(file, "pt")
            about = mapped.metadata() or {}
            self._keys, self._ends, self._sums = (mapped.get_tensor(n) for n in ("keys", "ends", "sums"))
            self._states = mapped.get_tensor("states")
            kind = f"{file.parent.name} {self._states.dtype} {about['computed']}"
            if about.get("index") != _index_sum(kind, self._keys, self._ends, self._sums):
                raise CorruptShard("its index fails the checksum")
            self.computed: torch.dtype = getattr(torch, about["computed"])
        except (SafetensorError, KeyError, AttributeError) as error:
            raise CorruptShard(" ".join(str(error).split())) from error
        self._checked = torch.zeros(len(self._ends), dtype=torch.bool)
        self._touched = 0.0

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[bytes]:
        """Iterates over the keys of its rows, in order."""
        raw = self._keys.numpy().tobytes()
        return (raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES))

    def row(self, number: int) -> Tensor:
        """Returns the states of a row, [tokens, hidden], as a view of the mapped file.

        Raises:
            CorruptShard: If they differ from what was written.
        """
        start = int(self._ends[number - 1]) if number else 0
        states = self._states[start : int(self._ends[number])]
        if not self._checked[number]:
            if _crc(states) != int(self._sums[number]):
                raise CorruptShard(f"row {number} fails its checksum")
            self._checked[number] = True
        if time.monotonic() - self._touched > _TOUCH:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.file)
        return states


def packed(rows_of_keys: Mapping[bytes, Tensor], computed: torch.dtype, partition: str) -> bytes:
    """Packs rows into the bytes of a shard; safetensors itself checks that a file has its full length.

    Args:
        rows_of_keys: Key → states of the row in the storage dtype, [tokens, hidden], on the CPU.
        computed: The dtype that they were computed in.
        partition: Name of the partition, which the checksum of the index covers.
    """
    rows = list(rows_of_keys.values())
    keys = torch.frombuffer(bytearray(b"".join(rows_of_keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    sums = torch.tensor([_crc(row) for row in rows])
    kind = f"{partition} {rows[0].dtype} {dtype_name(computed)}"
    about = {"computed": dtype_name(computed), "index": _index_sum(kind, keys, ends, sums)}
    return save({"states": torch.cat(rows), "keys": keys, "ends": ends, "sums": sums}, about)


def _index_sum(kind: str, *index: Tensor) -> str:
    """Computes the checksum of a shard's index and metadata; `kind` tells its partition and dtypes."""
    digest = hashlib.sha256(kind.encode())
    for tensor in index:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _crc(states: Tensor) -> int:
    return zlib.crc32(states.contiguous().view(torch.uint8).numpy().data)
