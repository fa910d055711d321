"""Keys and values of prompt prefixes: an instruction that many prompts share runs through the blocks only once.

States below the first edited block are kept row by row (see `PrefixCache`), which does not help a new prompt after a
known instruction: its tokens attend to the instruction's keys and values in every block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

#: Minimum number of tokens in a beginning; shorter ones are computed with the rest of their row.
SHORTEST = 12


@dataclass(frozen=True)
class Beginning:
    """A common beginning of rows, as computed by the blocks below a given one.

    Attributes:
        ids: Its token ids.
        states: States that enter the block, [tokens, hidden].
        keys, values: Keys and values of the blocks below, [blocks, heads, tokens, size].
    """

    ids: tuple[int, ...]
    states: Tensor
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return self.states.nbytes + self.keys.nbytes + self.values.nbytes


class PromptPrefixes:
    """The known beginnings for each block; the least recently used are evicted first.

    A row's beginning is all its lines but the last. That depends on the row alone, not on earlier rows, so that a
    resumed run computes the same as an uninterrupted one.

    Args:
        max_bytes: Memory for them, in bytes.
        breaks: Returns whether a token ends a line.
    """

    def __init__(self, max_bytes: int, breaks: Callable[[int], bool]) -> None:
        self.max_bytes = max_bytes
        self.breaks = breaks
        self.bytes = 0
        self._known: OrderedDict[tuple[int, tuple[int, ...]], Beginning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forgets all beginnings."""
        self._known.clear()
        self.bytes = 0

    def of(self, row: Sequence[int]) -> tuple[int, ...]:
        """Returns the tokens of a row's lines but the last, which keeps one token at least; none if they are few."""
        size = next((i + 1 for i in range(len(row) - 2, -1, -1) if self.breaks(row[i])), 0)
        return tuple(row[:size]) if size >= SHORTEST else ()

    def find(self, block: int, ids: tuple[int, ...]) -> Beginning | None:
        """Returns a beginning if it is known, else None."""
        found = self._known.get((block, ids))
        if found is not None:
            self._known.move_to_end((block, ids))
        return found

    def add(self, block: int, beginning: Beginning) -> None:
        """Keeps a beginning, if there is room."""
        if beginning.nbytes > self.max_bytes or (block, beginning.ids) in self._known:
            return
        self._known[block, beginning.ids] = beginning
        self.bytes += beginning.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._known.popitem(last=False)[1].nbytes


def filled_cache(beginnings: Sequence[Beginning | None], width: int) -> DynamicCache:
    """Creates a cache of keys and values that starts with the beginnings, one for each row, padded at their end.

    It keeps all of them whatever windows the model has, since rows are shorter than those.

    Args:
        beginnings: The beginning of each row; None for none.
        width: Number of tokens that they are padded to.
    """
    cache = DynamicCache()
    one = next((b for b in beginnings if b is not None), None)
    if one is None:
        return cache
    keys, values = (
        torch.stack([_padded(None if b is None else getattr(b, part), getattr(one, part), width) for b in beginnings])
        for part in ("keys", "values")
    )
    for block in range(one.keys.shape[0]):
        cache.update(keys[:, block], values[:, block], block)
    return cache


def laid_down(cache: DynamicCache, blocks: int) -> tuple[Tensor, Tensor]:
    """Returns one row's cached keys and values in the lowest blocks, [blocks, heads, tokens, size] each."""
    layers: list[Any] = cache.layers[:blocks]
    return torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])


def _padded(tensor: Tensor | None, like: Tensor, width: int) -> Tensor:
    blocks, heads, _, size = like.shape
    whole = like.new_zeros(blocks, heads, width, size)
    if tensor is not None:
        whole[:, :, : tensor.shape[2]] = tensor
    return whole
