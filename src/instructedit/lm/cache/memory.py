"""The prefix cache: hidden states below the first edited block, and outputs of the unedited model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from instructedit.lm.cache.disk import DiskCache
from instructedit.lm.cache.partition import Partition
from instructedit.lm.cache.shard import row_key
from instructedit.lm.tokens import TokenBatch

T = TypeVar("T")


class _Key(NamedTuple):
    """Key of a row of states, within one model."""

    block: int
    tokens: bytes
    apart: bool = False


class PrefixCache:
    """Hidden states by token row: in memory, with eviction of the least recently used, and behind that on disk.

    Causal attention makes a row's states independent of what stands beside or after it, so a row is computed once
    whatever batch it comes in.

    Args:
        max_bytes: Memory for the states, in bytes; 0 keeps nothing in memory.
        disk: Cache on disk, in which states are looked up next, and kept.

    Attributes:
        hits: Requested rows that were known, or occurred in the same batch already.
        misses: Rows that had to be computed.
        from_disk: Number of the hits that were read from disk.
    """

    def __init__(self, max_bytes: int = 2 << 30, disk: DiskCache | None = None) -> None:
        self.max_bytes = max_bytes
        self.disk = disk
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.from_disk = 0
        self._rows: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forgets everything in memory."""
        self._rows.clear()
        self.bytes = 0

    def flush(self) -> None:
        """Writes what is buffered for the disk, which also happens automatically now and then, and when Python ends."""
        if self.disk:
            self.disk.flush()

    def has_room(self, size: int) -> bool:
        """True if it can keep `size` bytes at once."""
        return self.max_bytes >= size or self.disk is not None

    def on_disk(self, batch: TokenBatch, block: int) -> list[bool]:
        """Checks for each row of a batch whether its states are on disk, [rows]; none is read."""
        keys = _keys(batch, block)
        partition = self._partition(batch, block)
        return [partition is not None and row_key(key.tokens) in partition for key in keys]

    def states(
        self, batch: TokenBatch, block: int, compute: Callable[[TokenBatch], Tensor], apart: bool = False
    ) -> Tensor:
        """Returns the hidden states that enter a block, and computes those that are not cached.

        Args:
            batch: Rows of tokens.
            block: Number of the block.
            compute: Computes the states of a batch, [rows, seq, hidden]; called for the rows that are not cached.
            apart: Computed states are reused only by other calls with `apart`, and are not written to disk.

        Returns:
            [rows, seq, hidden]; padding positions hold zeros or the states of padding, which nothing attends to.
        """
        if not self.has_room(1):
            return compute(batch)
        keys = _keys(batch, block)
        partition = self._partition(batch, block)

        def find(rows: list[int]) -> list[Tensor]:
            found = self._read(partition, [keys[i] for i in rows], batch.device)
            self.from_disk += len(found)
            found |= {keys[i]: self._rows[keys[i]] for i in rows if apart and keys[i] in self._rows}
            missing = [i for i in rows if keys[i] not in found]
            self.hits -= len(missing)
            self.misses += len(missing)
            if missing:
                part = batch.select(torch.tensor(missing))
                states = zip(missing, compute(part), part.lengths, strict=True)
                computed = {keys[i]: row[:length].clone() for i, row, length in states}
                found |= computed if apart else self._written(partition, computed)
            return [found[keys[i]] for i in rows]

        self.hits += len(keys)
        return batch.padded(self._memoized([key._replace(apart=apart) for key in keys], find))

    def memoized(self, kind: str, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Returns values of rows that are memoized in memory (never on disk), and computes those that are not.

        Args:
            kind: Kind of the values.
            keys: Keys that tell the rows apart.
            compute: Computes values for the numbers of unknown rows: tensors, strings, or tuples of them.
        """
        return self._memoized([(kind, key) for key in keys], compute)

    def _memoized(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[T]]) -> list[T]:
        known = {key: self._rows[key] for key in keys if key in self._rows}  # computing may evict some of them
        missing = [i for key, i in {key: i for i, key in enumerate(keys)}.items() if key not in known]
        found = zip(missing, compute(missing), strict=True) if missing else ()
        computed = {keys[i]: value for i, value in found}
        values = [computed[key] if key in computed else known[key] for key in keys]
        self._keep(keys, computed)
        return values

    def _partition(self, batch: TokenBatch, block: int) -> Partition | None:
        """Returns the partition of such rows on disk; none for block 0, whose inputs the model looks up faster."""
        return self.disk.partition(forward_pass(batch.device), block) if self.disk and block else None

    def _read(self, partition: Partition | None, keys: list[_Key], device: torch.device) -> dict[_Key, Tensor]:
        if not partition or not keys:
            return {}
        names = {row_key(key.tokens): key for key in keys}
        return {names[name]: row for name, row in partition.find(list(names), device).items()}

    def _written(self, partition: Partition | None, rows: dict[_Key, Tensor]) -> dict[_Key, Tensor]:
        """Passes computed rows to the disk, and returns them as the disk will give them back."""
        if not partition:
            return rows
        kept = partition.add({row_key(key.tokens): row for key, row in rows.items()})
        return dict(zip(rows, kept.values(), strict=True))

    def _keep(self, used: Sequence[Hashable], computed: Mapping[Any, Any]) -> None:
        for key, value in computed.items():
            self._rows[key] = value
            self.bytes += _size(value)
        for key in used:
            if key in self._rows:
                self._rows.move_to_end(key)
        while self.bytes > self.max_bytes:
            _, value = self._rows.popitem(last=False)
            self.bytes -= _size(value)


def _size(value: Any) -> int:
    """Returns the bytes of a tensor, a string, or a tuple of these."""
    if isinstance(value, tuple):
        return sum(map(_size, value))
    return value.nbytes if isinstance(value, Tensor) else len(value)


def _keys(batch: TokenBatch, block: int) -> list[_Key]:
    ids = batch.input_ids.numpy().astype("<i8", copy=False)
    return [_Key(block, ids[i, :size].tobytes()) for i, size in enumerate(batch.lengths)]


def forward_pass(device: torch.device) -> str:
    """Describes what determines the numbers of a forward pass besides the model (with its dtype) and the tokens."""
    return f"{device.type}, float32 matmul {torch.get_float32_matmul_precision()}"
