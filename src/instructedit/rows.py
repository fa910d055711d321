"""Rows of a tensor by their numbers, with a gradient that is the same in every run; and the dtype of statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Takes rows by their numbers, [n, …] and [m] → [m, …], like ``tensor[index]``.

    A row that is taken more than once adds up the gradients of its copies. The threads of a CPU add those of
    ``tensor[index]`` in the order in which they come, so that two equal runs differ in the last digits; those of
    ``index_select`` have one order, and take half the time. On a GPU it is the other way round.
    """
    return tensor[index] if tensor.is_cuda else tensor.index_select(0, index)


def in_full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64: statistics and losses are never in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gated(z: Tensor, mapped: Tensor, scale: Tensor, shift: Tensor, index: Tensor) -> Tensor:
    """Computes z + relu(mapped ⊙ scale[index] + shift[index]), the relu with slope 1 at zero.

    On a CPU, where the index ascends, no copy of scales and shifts is made for each row, and of the relu a bool of each
    number is kept.

    Args:
        z: What is added to, [rows, size].
        mapped: [rows, size].
        scale: [n, size].
        shift: [n, size].
        index: Which scale and shift a row has, [rows].
    """
    if z.is_cuda or bool((index.diff() < 0).any()):
        scale, shift = take_rows(scale, index), take_rows(shift, index)
        return z + torch.addcmul(shift, mapped, scale).clamp(min=0)  # clamp, unlike relu, has slope 1 at zero
    gate: Tensor = _Gated.apply(z, mapped, scale, shift, index.bincount(minlength=len(scale)).tolist())
    return gate


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mapped: Tensor, scale: Tensor, shift: Tensor, sizes: list[int]) -> Tensor:
        found, above = torch.empty_like(z), torch.empty_like(z, dtype=torch.bool)
        parts = (z.split(sizes), mapped.split(sizes), scale, shift, found.split(sizes), above.split(sizes))
        for own, values, s, c, out, kept in zip(*parts, strict=True):
            before = torch.addcmul(c, values, s)
            torch.ge(before, 0, out=kept)
            torch.add(own, before.clamp_(min=0), out=out)
        ctx.save_for_backward(mapped, scale, above)
        ctx.sizes = sizes
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mapped, scale, above = ctx.saved_tensors
        of_mapped, of_scale, of_shift = torch.empty_like(mapped), torch.empty_like(scale), torch.empty_like(scale)
        parts = (grad.split(ctx.sizes), mapped.split(ctx.sizes), above.split(ctx.sizes), of_mapped.split(ctx.sizes))
        for i, (own, values, kept, out) in enumerate(zip(*parts, strict=True)):
            through = own * kept
            torch.sum(through, 0, out=of_shift[i])
            torch.mul(through, scale[i], out=out)
            torch.sum(through.mul_(values), 0, out=of_scale[i])
        return grad, of_mapped, of_scale, of_shift, None
