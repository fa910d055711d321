"""Keys and values of what prompts begin with: an instruction that many prompts share runs through the blocks once.

States below the first edited block are kept row by row (see `PrefixCache`), which is of no use to a new prompt behind a
known instruction: its tokens attend to the instruction's keys and values in every block.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

#: A beginning of fewer tokens is computed again rather than kept.
SHORTEST = 12
#: Rows of fewer tokens are not kept: such a row is hardly an instruction.
ROW = 24


@dataclass(frozen=True)
class Beginning:
    """What rows begin with, as far as the blocks below one have made it.

    Attributes:
        ids: Its tokens.
        states: What enters the block, [tokens, hidden].
        keys, values: Of the blocks below, [blocks, heads, tokens, size].
    """

    ids: tuple[int, ...]
    states: Tensor
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.states.nbytes + self.keys.nbytes + self.values.nbytes

    def first(self, tokens: int) -> Beginning:
        """Its own beginning, as a copy."""
        return Beginning(
            self.ids[:tokens], self.states[:tokens].clone(), self.keys[:, :, :tokens].clone(),
            self.values[:, :, :tokens].clone(),
        )  # fmt: skip


class PromptPrefixes:
    """The beginnings that are known, for each block; the least recently used are thrown out first.

    A row is kept whole at first; when a later row shares most of it, the shared part takes its place.

    Args:
        max_bytes: Room for them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._known: OrderedDict[tuple[int, tuple[int, ...]], Beginning] = OrderedDict()
        self._sorted: list[tuple[int, tuple[int, ...]]] = []

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forgets all."""
        self._known.clear()
        self._sorted.clear()
        self.bytes = 0

    def find(self, block: int, row: Sequence[int]) -> Beginning | None:
        """The longest known beginning of a row that leaves at least one of its tokens; None if all are short."""
        shared, key = self._nearest(block, row)
        shared = min(shared, len(row) - 1)
        if shared < SHORTEST:
            return None
        self._known.move_to_end(key)
        whole = self._known[key]
        if shared == len(whole.ids):
            return whole
        part = whole.first(shared)
        if 2 * shared >= len(whole.ids):
            self._remove(key)
        self.add(block, part)
        return part

    def lacks(self, block: int, row: Sequence[int]) -> bool:
        """Whether a row is long, and less than half of it is known."""
        return len(row) >= ROW and 2 * self._nearest(block, row)[0] < len(row)

    def _nearest(self, block: int, row: Sequence[int]) -> tuple[int, tuple[int, tuple[int, ...]]]:
        """How much of a row is known at most, and by which beginning."""
        key = (block, tuple(row))
        place = bisect.bisect_left(self._sorted, key)
        near = self._sorted[max(0, place - 1) : place + 1]  # what shares most with the row stands next to it
        shared = [(shared_tokens(other[1], row), other) for other in near if other[0] == block]
        return max(shared, default=(0, key))

    def add(self, block: int, beginning: Beginning) -> None:
        """Keeps a beginning, if there is room."""
        key = (block, beginning.ids)
        if beginning.nbytes > self.max_bytes or key in self._known:
            return
        self._known[key] = beginning
        bisect.insort(self._sorted, key)
        self.bytes += beginning.nbytes
        while self.bytes > self.max_bytes:
            self._remove(next(iter(self._known)))

    def _remove(self, key: tuple[int, tuple[int, ...]]) -> None:
        self.bytes -= self._known.pop(key).nbytes
        del self._sorted[bisect.bisect_left(self._sorted, key)]


def filled_cache(config: PreTrainedConfig, beginnings: Sequence[Beginning | None], width: int) -> DynamicCache:
    """A cache of keys and values that opens with the beginnings, one for each row, padded at their end.

    Args:
        config: Of the model.
        beginnings: Of each row; None for none.
        width: Tokens that they are padded to.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
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


def laid_down(
    cache: DynamicCache, blocks: int, places: Tensor, width: int, before: Beginning | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of a row's tokens in the lowest blocks, each [blocks, heads, tokens, size].

    Args:
        cache: As a forward pass over trees left it.
        blocks: How many.
        places: Of the row's tokens among those of all trees.
        width: Of a tree.
        before: What stands before the row's tree.
    """
    tree, parts = int(places[0]) // width, []
    for name in ("keys", "values"):
        held = [getattr(layer, name)[tree] for layer in cache.layers[:blocks]]
        at = (places % width + held[0].shape[-2] - width).to(held[0].device)
        own = torch.stack([one[:, at] for one in held])
        parts.append(own if before is None else torch.cat([getattr(before, name), own], -2))
    return parts[0], parts[1]


def _padded(tensor: Tensor | None, like: Tensor, width: int) -> Tensor:
    blocks, heads, _, size = like.shape
    whole = like.new_zeros(blocks, heads, width, size)
    if tensor is not None:
        whole[:, :, : tensor.shape[2]] = tensor
    return whole


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return length
    return min(len(one), len(other))
