"""The prefix cache: states of token rows in memory, behind it on disk, and the keys and values of prompt prefixes.

Why not diskcache or LMDB: the states are large tensors, written once and read many times. A shard is a safetensors
file, so a row is read as a view of the mapped file, with its dtype and checksum, and no row beside it is copied. Of a
value, diskcache keeps what pickle makes of it unless told otherwise (this project unpickles nothing), and LMDB plain
bytes: the dtypes, shapes and checksums would stay our own, and those are the larger part of this package.
"""

from instructedit.lm.cache.disk import DiskCache
from instructedit.lm.cache.memory import PrefixCache

__all__ = ["DiskCache", "PrefixCache"]
