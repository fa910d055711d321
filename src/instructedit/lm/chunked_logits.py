"""Logits computed a few positions at a time: all at once, they are often the largest tensor of a forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Takes states [n, hidden] and their slice of all positions; returns one number per state, [n], and optionally more
#: tensors, [n, …].
ChunkFunction = Callable[[Tensor, slice], tuple[Tensor, ...]]


def positionwise(states: Tensor, function: ChunkFunction, size: int) -> tuple[Tensor, ...]:
    """Applies `function` to all states, at most `size` at a time, and concatenates the results.

    The number that `function` returns for a state must depend on that state alone, and be differentiable with respect
    to it: its gradient is computed in the forward pass, so that no logits are kept for a backward pass.

    Args:
        states: [positions, hidden].
        function: See `ChunkFunction`.
        size: Maximum number of positions at a time.
    """
    if torch.is_grad_enabled() and states.requires_grad:
        found: tuple[Tensor, ...] = _Positionwise.apply(states, function, size)
        return found
    return _joined([function(states[at], at) for at in parts(len(states), size)])


class _Positionwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, function: ChunkFunction, size: int) -> tuple[Tensor, ...]:
        slopes, found_parts = [], []
        for at in parts(len(states), size):
            with torch.enable_grad():
                part = states[at].detach().requires_grad_()
                number, *others = function(part, at)
                slopes.append(torch.autograd.grad(number.sum(), part)[0])
            found_parts.append((number.detach(), *others))
        ctx.save_for_backward(torch.cat(slopes))
        found = _joined(found_parts)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad.unsqueeze(-1).to(slopes.dtype), None, None


def parts(positions: int, size: int) -> list[slice]:
    """Splits positions into slices of at most `size` and of similar length; no positions give one empty slice."""
    count = max(1, -(-positions // size))
    ends = [positions * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _joined(columns: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*columns, strict=True))
