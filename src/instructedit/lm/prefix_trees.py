"""Prefix trees of token rows: common beginnings of rows are computed once, with hardly any padding.

Prompts that share an instruction are mostly instruction, and a prompt and its aliases are mostly prompt. In a tree each
token attends to those on the path to the root, which are those before it in its row, and keeps its position in the row:
causal attention then gives it the same states as in the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Maximum number of tokens in a tree (a longer row stands alone): attention costs each token as many products.
WIDTH = 256
#: Maximum widths to choose from, since the trees of several groups are all padded to the largest tree.
WIDTHS = (48, 64, 96, 128, 192, WIDTH)


@dataclass(frozen=True)
class PrefixTrees:
    """A batch of prefix trees that hold rows of tokens.

    Attributes:
        ids: Tokens, [trees, width].
        positions: Position of each token in its rows, [trees, width].
        sees: Which tokens (last dimension) each token (second dimension) attends to, [trees, width, width].
        places: Indices of each row's tokens among those of all trees, one [length] for each row.
        groups: The group whose rows a tree holds, [trees].
    """

    ids: Tensor
    positions: Tensor
    sees: Tensor
    places: list[Tensor]
    groups: Tensor

    @classmethod
    def of(cls, rows: Sequence[list[int]], width: int = WIDTH, groups: Sequence[int] | None = None) -> PrefixTrees:
        """Builds the trees of rows.

        Args:
            rows: Token ids.
            width: Maximum number of tokens in a tree.
            groups: Group of each row; rows of different groups share no tree. By default all are in one.
        """
        return _built(rows, groups or [0] * len(rows), _Plan.of(_Steps.of(rows, groups), width))

    @classmethod
    def fitting(cls, rows: Sequence[list[int]], groups: Sequence[int] | None = None) -> PrefixTrees:
        """Builds the trees of rows, of the width that costs least in padded tokens and their attention."""
        steps = _Steps.of(rows, groups)
        plans = [_Plan.of(steps, width) for width in WIDTHS]
        return _built(rows, groups or [0] * len(rows), min(plans, key=lambda plan: plan.cost))

    @property
    def padded_tokens(self) -> int:
        """Number of tokens of all trees, padding included."""
        return self.ids.numel()

    @property
    def of_rows(self) -> Tensor:
        """Index of each row's tree, [rows]."""
        return torch.stack([places[0] for places in self.places]) // self.ids.shape[1]

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the inputs for a model of this dtype."""
        mask = torch.zeros(self.sees.shape, dtype=dtype).masked_fill_(~self.sees, torch.finfo(dtype).min)
        inputs = {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask.unsqueeze(1)}
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def read_once(self, rows: Sequence[list[int]]) -> PrefixTrees:
        """Returns the same trees, in which beginnings that occur in several trees are read from the first one.

        Rounding differs between trees; this way the states of common beginnings are bit-identical.

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
        """Gathers each row's states, [trees, width, hidden] → [rows, longest row, hidden]; padding holds any states."""
        places = torch.nn.utils.rnn.pad_sequence(self.places, batch_first=True)
        return found.flatten(0, 1)[places.to(found.device)]

    def gather(self, rows: Tensor) -> Tensor:
        """Arranges the rows' states in trees, [rows, seq, hidden] → [trees, width, hidden]; the inverse of `states`."""
        trees = rows.new_zeros(self.ids.numel(), rows.shape[-1])
        where = torch.cat(self.places).to(rows.device)
        row = torch.repeat_interleave(torch.tensor([len(p) for p in self.places])).to(rows.device)
        at = torch.cat([torch.arange(len(p)) for p in self.places]).to(rows.device)
        trees[where] = rows[row, at]
        return trees.view(*self.ids.shape, -1)

    def at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Returns the indices of positions in rows among the tokens of all trees, [positions]."""
        starts = torch.tensor([0, *(len(p) for p in self.places)]).cumsum(0)
        return torch.cat(self.places)[starts[rows] + positions]


def in_parts(
    rows: Sequence[list[int]], groups: Sequence[int], tokens: int, beside: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Splits row numbers into parts whose trees have at most `tokens` tokens (or of one row that has more).

    Args:
        rows: Token ids.
        groups: Group of each row; rows of different groups share nothing.
        tokens: Maximum number of tokens in a part, before padding.
        beside: Tokens that each row takes in addition to its own.
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
    """Row numbers in an order in which each row shares most with the one before, and the number of shared tokens."""

    sizes: list[int]
    groups: list[int]

    @classmethod
    def of(cls, rows: Sequence[list[int]], groups: Sequence[int] | None) -> _Steps:
        of_row = list(groups) if groups is not None else [0] * len(rows)
        steps, before = cls(), None
        for i in sorted(range(len(rows)), key=lambda i: (of_row[i], rows[i])):
            same_group = before is not None and of_row[before] == of_row[i]
            steps.append((i, shared_tokens(rows[before], rows[i]) if same_group and before is not None else 0))
            before = i
        steps.sizes, steps.groups = [len(row) for row in rows], of_row
        return steps


@dataclass(frozen=True)
class _Plan:
    """An assignment of rows to trees, and of their tokens to places within these.

    Attributes:
        trees: Number of each row's tree.
        paths: Numbers of each row's tokens within its tree.
        count: Number of trees.
        width: Number of tokens in the largest tree.
    """

    trees: dict[int, int]
    paths: dict[int, list[int]]
    count: int
    width: int

    @property
    def cost(self) -> float:
        """Cost of all trees: their tokens, padding included, and what attention to a whole tree costs each of them."""
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


def _built(rows: Sequence[list[int]], groups: Sequence[int], plan: _Plan) -> PrefixTrees:
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
    """Counts the tokens that two sequences have in common at their beginning."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return length
    return min(len(one), len(other))
