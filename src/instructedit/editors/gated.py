"""The gate of a hypernetwork's residual layer, z + relu(mapped ⊙ scale + shift), with a scale and shift per site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instructedit.rows import take_rows


def gated(z: Tensor, mapped: Tensor, scale: Tensor, shift: Tensor, index: Tensor) -> Tensor:
    """Computes z + relu(mapped ⊙ scale[index] + shift[index]), where the slope of the relu at zero is 1.

    On a CPU with an ascending index, scales and shifts are not copied for each row, and only a boolean mask of the relu
    is kept for the backward pass.

    Args:
        z: The residual input, [rows, size].
        mapped: [rows, size].
        scale: [n, size].
        shift: [n, size].
        index: Number of each row's scale and shift, [rows].
    """
    if z.is_cuda or bool((index.diff() < 0).any()):
        return gated_each(z, mapped, take_rows(scale, index), take_rows(shift, index))
    gate: Tensor = _Gated.apply(z, mapped, scale, shift, index.bincount(minlength=len(scale)).tolist())
    return gate


def gated_each(z: Tensor, mapped: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Computes z + relu(mapped ⊙ scale + shift) where each row has its own scale and shift, all [rows, size]."""
    # clamp, unlike relu, has slope 1 at zero, where the identity start of a hypernetwork puts every unit
    return z + torch.addcmul(shift, mapped, scale).clamp(min=0)


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
