"""Rows as trees of tokens: what rows begin with together is computed once, and next to nothing is padded.

Prompts that share an instruction are mostly instruction. In a tree each token sees those on the way to its root, which
are those before it in its row, and has its row's position: causal attention then gives it the row's own states.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Tokens of a tree, at most (a longer row stands alone): attention costs each token as many products.
WIDTH = 256


@dataclass(frozen=True)
class Forest:
    """Trees side by side.

    Attributes:
        ids: Tokens, [trees, width].
        positions: Of each token in its rows, [trees, width].
        sees: What each token (second dimension) attends to, [trees, width, width].
        places: Where each row's tokens are among those of all trees, one [length] for each row.
    """

    ids: Tensor
    positions: Tensor
    sees: Tensor
    places: list[Tensor]

    @classmethod
    def of(cls, rows: Sequence[list[int]], width: int = WIDTH) -> Forest:
        """The rows' trees."""
        paths: dict[int, list[int]] = {}  # of a row's tokens within its tree
        tree_of: dict[int, int] = {}
        tree, size, before = -1, 0, None
        for i in sorted(range(len(rows)), key=rows.__getitem__):  # each shares most with the one before
            shared = 0 if before is None else _common(rows[before], rows[i])
            if before is None or size + len(rows[i]) - shared > width:
                tree, size, shared = tree + 1, 0, 0
            opening: list[int] = paths[before][:shared] if before is not None else []
            paths[i], tree_of[i] = [*opening, *range(size, size + len(rows[i]) - shared)], tree
            size, before = size + len(rows[i]) - shared, i
        width = max(map(max, paths.values())) + 1
        ids = torch.zeros(tree + 1, width, dtype=torch.long)
        positions, sees = torch.zeros_like(ids), torch.eye(width, dtype=torch.bool).repeat(tree + 1, 1, 1)
        places = []
        for i, row in enumerate(rows):
            tree, path = tree_of[i], torch.tensor(paths[i])
            ids[tree, path] = torch.tensor(row)
            positions[tree, path] = torch.arange(len(row))
            sees[tree, path[:, None], path] = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            places.append(tree * width + path)
        return cls(ids, positions, sees, places)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a model of this dtype is called with."""
        mask = torch.zeros(self.sees.shape, dtype=dtype).masked_fill_(~self.sees, torch.finfo(dtype).min)
        inputs = {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask.unsqueeze(1)}
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def states(self, found: Tensor) -> Tensor:
        """The trees' states row by row, [trees, width, hidden] → [rows, longest row, hidden]; padding holds some."""
        places = torch.nn.utils.rnn.pad_sequence(self.places, batch_first=True)
        return found.flatten(0, 1)[places.to(found.device)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
