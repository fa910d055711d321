"""The gate of a hypernetwork's residual layer: z + relu(mapped ⊙ scale + shift), a scale and a shift for each site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instructedit.rows import take_rows


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
        return gated_each(z, mapped, take_rows(scale, index), take_rows(shift, index))
    gate: Tensor = _Gated.apply(z, mapped, scale, shift, index.bincount(minlength=len(scale)).tolist())
    return gate


def gated_each(z: Tensor, mapped: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same where each row has a scale and a shift of its own, all [rows, size]."""
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
