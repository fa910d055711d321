"""Rows as trees of tokens: what rows begin with together is computed once, and next to nothing is padded.

Prompts that share an instruction are mostly instruction, and a prompt and its aliases are mostly prompt. In a tree each
token sees those on the way to its root, which are those before it in its row, and has its row's position: causal
attention then gives it the row's own states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Tokens of a tree, at most (a longer row stands alone): attention costs each token as many products.
WIDTH = 256
#: Widths that are tried where trees of several groups would be padded to the largest.
WIDTHS = (48, 64, 96, 128, 192, WIDTH)


@dataclass(frozen=True)
class PrefixTrees:
    """Trees side by side.

    Attributes:
        ids: Tokens, [trees, width].
        positions: Of each token in its rows, [trees, width].
        sees: What each token (second dimension) attends to, [trees, width, width].
        places: Where each row's tokens are among those of all trees, one [length] for each row.
        groups: The group whose rows a tree holds, [trees].
    """

    ids: Tensor
    positions: Tensor
    sees: Tensor
    places: list[Tensor]
    groups: Tensor

    @classmethod
    def of(cls, rows: Sequence[list[int]], width: int = WIDTH, groups: Sequence[int] | None = None) -> PrefixTrees:
        """The rows' trees.

        Args:
            rows: Token ids.
            width: Tokens of a tree, at most.
            groups: Of each row; rows of different groups share no tree. By default all are of one.
        """
        return _planted(rows, groups or [0] * len(rows), _Plan.of(_Steps.of(rows, groups), width))

    @classmethod
    def fitting(cls, rows: Sequence[list[int]], groups: Sequence[int] | None = None) -> PrefixTrees:
        """The rows' trees, of the width at which all of them, padded, have the fewest tokens."""
        steps = _Steps.of(rows, groups)
        plans = [_Plan.of(steps, width) for width in WIDTHS]
        return _planted(rows, groups or [0] * len(rows), min(plans, key=lambda plan: plan.padded))

    @property
    def padded(self) -> int:
        """Tokens of all trees, padding included."""
        return self.ids.numel()

    @property
    def of_rows(self) -> Tensor:
        """The tree of each row, [rows]."""
        return torch.stack([places[0] for places in self.places]) // self.ids.shape[1]

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a model of this dtype is called with."""
        mask = torch.zeros(self.sees.shape, dtype=dtype).masked_fill_(~self.sees, torch.finfo(dtype).min)
        inputs = {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask.unsqueeze(1)}
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def read_once(self, rows: Sequence[list[int]]) -> PrefixTrees:
        """The same trees, where what stands in several of them is read from the first that has it.

        Each tree rounds in its own way; so rows that begin alike have the same states there, to the bit.

        Args:
            rows: Token ids of the trees' rows.
        """
        known: dict[tuple[int, int], int] = {}
        places: list[Tensor] = []
        for row, own in zip(rows, self.places, strict=True):
            read, last = [], -1
            for token, place in zip(row, own.tolist(), strict=True):
                last = known.setdefault((last, token), place)
                read.append(last)
            places.append(torch.tensor(read))
        return replace(self, places=places)

    def states(self, found: Tensor) -> Tensor:
        """The trees' states row by row, [trees, width, hidden] → [rows, longest row, hidden]; padding holds some."""
        places = torch.nn.utils.rnn.pad_sequence(self.places, batch_first=True)
        return found.flatten(0, 1)[places.to(found.device)]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows' states as the trees', [rows, seq, hidden] → [trees, width, hidden]; the inverse of `states`."""
        trees = rows.new_zeros(self.ids.numel(), rows.shape[-1])
        where = torch.cat(self.places).to(rows.device)
        row = torch.repeat_interleave(torch.tensor([len(p) for p in self.places])).to(rows.device)
        at = torch.cat([torch.arange(len(p)) for p in self.places]).to(rows.device)
        trees[where] = rows[row, at]
        return trees.view(*self.ids.shape, -1)

    def at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where positions of rows are among the tokens of all trees, [positions]."""
        starts = torch.tensor([0, *(len(p) for p in self.places)]).cumsum(0)
        return torch.cat(self.places)[starts[rows] + positions]


def in_parts(
    rows: Sequence[list[int]], groups: Sequence[int], tokens: int, beside: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Row numbers in parts whose trees have at most so many tokens (or of one row that has more).

    Args:
        rows: Token ids.
        groups: Of each row; rows of different groups share nothing.
        tokens: Of a part, before padding.
        beside: What each row takes beside its own tokens.
    """
    part: list[int] = []
    total = 0
    for i, shared in _Steps.of(rows, groups):
        more = beside[i] if beside else 0
        new = len(rows[i]) - shared + more
        if part and total + new > tokens:
            yield part
            part, total, new = [], 0, len(rows[i]) + more
        part.append(i)
        total += new
    if part:
        yield part


class _Steps(list[tuple[int, int]]):
    """Row numbers in an order in which each row shares most with the one before, and how many tokens it shares."""

    sizes: list[int]
    groups: list[int]

    @classmethod
    def of(cls, rows: Sequence[list[int]], groups: Sequence[int] | None) -> _Steps:
        of_row = list(groups) if groups is not None else [0] * len(rows)
        steps, before = cls(), None
        for i in sorted(range(len(rows)), key=lambda i: (of_row[i], rows[i])):
            together = before is not None and of_row[before] == of_row[i]
            steps.append((i, shared_tokens(rows[before], rows[i]) if together and before is not None else 0))
            before = i
        steps.sizes, steps.groups = [len(row) for row in rows], of_row
        return steps


@dataclass(frozen=True)
class _Plan:
    """Which tree each row stands in, and where its tokens are in it.

    Attributes:
        trees: Of each row.
        paths: Of each row, its tokens' numbers within the tree.
        count: Trees.
        width: Of the largest.
    """

    trees: dict[int, int]
    paths: dict[int, list[int]]
    count: int
    width: int

    @property
    def padded(self) -> float:
        """Tokens of all trees, padding included, and what attention to a whole tree costs each of them."""
        return self.count * self.width * (1 + self.width / 2048)

    @classmethod
    def of(cls, steps: _Steps, width: int) -> _Plan:
        paths: dict[int, list[int]] = {}
        trees: dict[int, int] = {}
        tree, size, widest = -1, 0, 0
        before: int | None = None
        for i, shared in steps:
            new_group = before is None or steps.groups[before] != steps.groups[i]
            if before is None or new_group or size + steps.sizes[i] - shared > width:
                tree, size, shared = tree + 1, 0, 0
            opening: list[int] = paths[before][:shared] if shared and before is not None else []
            paths[i], trees[i] = [*opening, *range(size, size + steps.sizes[i] - shared)], tree
            size, before = size + steps.sizes[i] - shared, i
            widest = max(widest, size)
        return cls(trees, paths, tree + 1, widest)


def _planted(rows: Sequence[list[int]], groups: Sequence[int], plan: _Plan) -> PrefixTrees:
    ids = torch.zeros(plan.count, plan.width, dtype=torch.long)
    positions, sees = torch.zeros_like(ids), torch.eye(plan.width, dtype=torch.bool).repeat(plan.count, 1, 1)
    of_tree = torch.zeros(plan.count, dtype=torch.long)
    places = []
    for i, row in enumerate(rows):
        tree, path = plan.trees[i], torch.tensor(plan.paths[i])
        ids[tree, path] = torch.tensor(row)
        positions[tree, path] = torch.arange(len(row))
        sees[tree, path[:, None], path] = torch.ones(len(row), len(row), dtype=torch.bool).tril()
        of_tree[tree] = groups[i]
        places.append(tree * plan.width + path)
    return PrefixTrees(ids, positions, sees, places, of_tree)


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return length
    return min(len(one), len(other))
