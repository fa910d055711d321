"""The prefix cache: states of token rows in memory and on disk, and the keys and values of prompt prefixes.

Why not diskcache or LMDB: the states are large tensors, written once and read many times. A shard is a safetensors
file, so a row is read as a view of the mapped file, with its dtype and checksum, and no other row is copied. diskcache
pickles values by default (this project unpickles nothing), and LMDB stores plain bytes: dtypes, shapes and
checksums would remain our own work, and they are the larger part of this package.
"""

from instructedit.lm.cache.disk import DiskCache
from instructedit.lm.cache.memory import PrefixCache

__all__ = ["DiskCache", "PrefixCache"]
