"""AdamW that computes the dense gradients of large matrices one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from instructedit.editors.factored_gradients import factored_matrices


class ProductAdamW(torch.optim.AdamW):
    """AdamW for factored gradients (see `editors.factored_gradients`), only one of which is dense at a time.

    Its steps equal AdamW's, except for the order of a few sums.
    """

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for _, factors in factored_matrices(self._parameters()):
            factors.clear()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients so that their total norm is at most `max_norm` (see ``clip_grad_norm_``).

        Returns:
            The total norm before scaling.
        """
        dense = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        factored = [factors for _, factors in factored_matrices(self._parameters())]
        squares = [torch.nn.utils.get_total_norm(dense).square(), *(factors.squared_norm() for factors in factored)]
        norm = torch.stack(squares).sum().sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in dense:
            gradient.mul_(scale)
        for factors in factored:
            factors.scale(scale)
        return norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step: first for all dense gradients, then for each matrix with a factored gradient in turn."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = list(factored_matrices(self._parameters()))
        dense = [(parameter, parameter.grad) for parameter in self._parameters()]
        super().step()
        for parameter, _ in dense:
            parameter.grad = None
        for parameter, factors in matrices:
            parameter.grad = factors.dense()
            super().step()
            parameter.grad = None
        for parameter, gradient in dense:
            parameter.grad = gradient
        return loss
