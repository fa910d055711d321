"""Prefix states on disk: files written whole or not at all, mapped for reading, the least lately used thrown out first.

A cache folder holds a partition (a folder) for each model, block, manner of forward pass and storage dtype, so that no
model ever meets another's states::

    <32 hex digits>/meta.json            what the partition is of, to be read by people
    <32 hex digits>/<name>.safetensors   a shard: rows of states, with an index and checksums
    <32 hex digits>/<name>.part          a shard that is being written

Every process writes shards of its own and publishes each by a rename; nothing that is published ever changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from instructedit.errors import UserError
from instructedit.lm.cache.partition import Partition
from instructedit.lm.cache.shard import STORAGE_DTYPES


class DiskCache:
    """The states of one model on disk.

    Args:
        root: The cache folder; other models and processes may use it too.
        max_bytes: Room for all shards in it, of all models.
        storage_dtype: ``float32`` keeps states exactly as they are computed; ``bfloat16`` and ``float16`` round them.
        model: Gives ``lm`` (a name) and ``model`` (a fingerprint); called once, when first needed.

    Raises:
        UserError: If there is no such dtype, no room, or the folder is a file.
    """

    def __init__(
        self, root: str | Path, max_bytes: int, storage_dtype: str, model: Callable[[], dict[str, str]]
    ) -> None:
        if storage_dtype not in STORAGE_DTYPES:
            raise UserError(f"cache_dtype: {storage_dtype!r} is none of {', '.join(STORAGE_DTYPES)}")
        if max_bytes < 1:
            raise UserError(f"cache_disk_bytes must be positive, got {max_bytes}; without cache_dir nothing is kept")
        self.root = Path(root).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"cache_dir {self.root}: not a folder")
        self.max_bytes, self.storage_dtype = max_bytes, storage_dtype
        self._model = model
        self._facts: dict[str, str] = {}
        self._partitions: dict[tuple[str, int], Partition] = {}
        weakref.finalize(self, _flush, self._partitions)  # buffers are written when the model goes or Python ends

    def partition(self, forward: str, block: int) -> Partition:
        """Gives the partition of the states that enter a block.

        Args:
            forward: What beside the model decides the numbers: the device, the precision of its products.
            block: Number of the block.
        """
        if (forward, block) not in self._partitions:
            self._facts = self._facts or self._model()
            about = {**self._facts, "block": block, "forward": forward, "at_rest": self.storage_dtype}
            self._partitions[forward, block] = Partition(self.root, self.max_bytes, about)
        return self._partitions[forward, block]

    def flush(self) -> None:
        """Writes what is buffered."""
        _flush(self._partitions)

    @property
    def written(self) -> int:
        """Bytes that this process has written."""
        return sum(partition.written for partition in self._partitions.values())

    @property
    def evicted(self) -> int:
        """Bytes that it has thrown out to keep to the bound."""
        return sum(partition.evicted for partition in self._partitions.values())

    @property
    def broken(self) -> bool:
        """Whether the disk has refused to take more."""
        return any(partition.broken for partition in self._partitions.values())


def _flush(partitions: Mapping[Any, Partition]) -> None:
    for partition in partitions.values():
        partition.flush()
