"""Reading logits a few positions at a time: all of them at once are often the largest tensor of a pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Gives for states [n, hidden] at the given places of all one number each, [n], and whatever else is wanted, [n, …].
Read = Callable[[Tensor, slice], tuple[Tensor, ...]]


def positionwise(states: Tensor, read: Read, size: int) -> tuple[Tensor, ...]:
    """What `read` gives for all states, put together; no more than `size` of them are read at once.

    The first number of a state must depend on that state alone. It is differentiable with respect to it: its slope is
    found at once, so that no logits wait for a backward pass.

    Args:
        states: [positions, hidden].
        read: See `Read`.
        size: Positions at once.
    """
    if torch.is_grad_enabled() and states.requires_grad:
        found: tuple[Tensor, ...] = _Positionwise.apply(states, read, size)
        return found
    return _joined([read(states[at], at) for at in parts(len(states), size)])


class _Positionwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, read: Read, size: int) -> tuple[Tensor, ...]:
        slopes, found_parts = [], []
        for at in parts(len(states), size):
            with torch.enable_grad():
                part = states[at].detach().requires_grad_()
                number, *others = read(part, at)
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
    """Slices of at most `size` positions and about one length; one slice, if empty, where there are none."""
    count = max(1, -(-positions // size))
    ends = [positions * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _joined(columns: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*columns, strict=True))
