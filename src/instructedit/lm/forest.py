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
    def of(cls, rows: Sequence[Sequence[int]], width: int = WIDTH) -> Forest:
        """The rows' trees. Rows in dictionary order share most with the one before."""
        paths: dict[int, list[int]] = {}  # row → place of each of its tokens within its tree
        trees: list[list[int]] = []  # rows
        size, last = width, -1
        for i in sorted(range(len(rows)), key=lambda i: rows[i]):
            shared = _common(rows[last], rows[i]) if trees else 0
            if size + len(rows[i]) - shared > width or not trees:
                trees.append([])
                size = shared = 0
            paths[i] = [*(paths[last][:shared] if shared else ()), *range(size, size + len(rows[i]) - shared)]
            trees[-1].append(i)
            size, last = size + len(rows[i]) - shared, i
        width = max(max(paths[i]) for i in paths) + 1
        ids = torch.zeros(len(trees), width, dtype=torch.long)
        positions, sees = torch.zeros_like(ids), torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
        places: list[Tensor] = [ids[0]] * len(rows)
        for tree, members in enumerate(trees):
            for i in members:
                path = torch.tensor(paths[i])
                ids[tree, path] = torch.tensor(rows[i])
                positions[tree, path] = torch.arange(len(path))
                sees[tree, path[:, None], path] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
                places[i] = tree * width + path
        return cls(ids, positions, sees, places)

    def states(self, found: Tensor, width: int) -> Tensor:
        """The trees' states row by row, [trees, width, hidden] → [rows, width, hidden]; padding holds zeros."""
        flat = found.flatten(0, 1)
        rows = [flat[place.to(flat.device)] for place in self.places]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return torch.nn.functional.pad(padded, (0, 0, 0, width - padded.shape[1]))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
