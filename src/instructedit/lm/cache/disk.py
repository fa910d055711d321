"""Prefix states on disk: files that are written atomically, mapped for reading, and evicted least recently used first.

A cache folder holds a partition (a folder) for each model, block, kind of forward pass and storage dtype, so that no
model ever reads another's states::

    <32 hex digits>/meta.json            a description of the partition, for people to read
    <32 hex digits>/<name>.safetensors   a shard: rows of states, with an index and checksums
    <32 hex digits>/<name>.part          a shard that is being written

Every process writes shards of its own and publishes each by a rename; published files never change.
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
        max_bytes: Maximum total size of all shards in it, of all models.
        storage_dtype: ``float32`` keeps states exactly as they are computed; ``bfloat16`` and ``float16`` round them.
        model: Returns ``lm`` (a name) and ``model`` (a fingerprint); called once, when first needed.

    Raises:
        UserError: If the dtype is unknown, the maximum size is not positive, or the folder is a file.
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
        """Returns the partition of the states that enter a block.

        Args:
            forward: What determines the numbers besides the model: the device, and the precision of its products.
            block: Number of the block.
        """
        if (forward, block) not in self._partitions:
            self._facts = self._facts or self._model()
            about = {**self._facts, "block": block, "forward": forward, "at_rest": self.storage_dtype}
            self._partitions[forward, block] = Partition(self.root, self.max_bytes, about)
        return self._partitions[forward, block]

    def flush(self) -> None:
        """Writes the buffered rows."""
        _flush(self._partitions)

    @property
    def written(self) -> int:
        """Bytes that this process has written."""
        return sum(partition.written for partition in self._partitions.values())

    @property
    def evicted(self) -> int:
        """Bytes that this process has evicted to stay within the maximum size."""
        return sum(partition.evicted for partition in self._partitions.values())

    @property
    def broken(self) -> bool:
        """True once the disk has refused a write."""
        return any(partition.broken for partition in self._partitions.values())


def _flush(partitions: Mapping[Any, Partition]) -> None:
    for partition in partitions.values():
        partition.flush()
