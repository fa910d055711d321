"""Gradients of large matrices kept as factors with few rows, ∇W = Xᵀ G, and multiplied only for the optimiser.

The low rank of the LM's gradient that MEND exploits (at most the number of tokens; its section 3.1) holds for the
hypernetwork's own gradient too: a step that sees t tokens gives each of its matrices a gradient of rank at most t.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class FactoredGradient:
    """The gradient of one matrix [in, out] as a sum of products, Σ_k x_kᵀ g_k."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._g: list[Tensor] = []

    def __len__(self) -> int:
        """Returns the number of rows."""
        return sum(map(len, self._x))

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds xᵀ g; `x` [rows, in] and `g` [rows, out] are stored without a copy."""
        self._x.append(x)
        self._g.append(g)

    def clear(self) -> None:
        """Removes all rows."""
        self._x, self._g = [], []

    def scale(self, factor: Tensor) -> None:
        """Multiplies the gradient by a number."""
        self._g = [g * factor for g in self._g]

    def squared_norm(self) -> Tensor:
        """Computes ‖∇W‖² without forming ∇W, as the sum of (X Xᵀ) ∘ (G Gᵀ)."""
        x, g = torch.cat(self._x), torch.cat(self._g)
        return ((x @ x.T) * (g @ g.T)).sum()

    def dense(self) -> Tensor:
        """Computes ∇W, [in, out]."""
        first, *others = zip(self._x, self._g, strict=True)
        total = first[0].T @ first[1]
        for x, g in others:
            total.addmm_(x.T, g)
        return total


def factor_gradients(parameters: Iterable[nn.Parameter], on: bool = True) -> None:
    """Switches factored gradients on or off for all matrices among the parameters.

    Only products computed by `linear` are kept as factors; any other use accumulates into ``grad`` as usual.
    """
    for parameter in parameters:
        if parameter.ndim == 2:
            parameter.factored_grad = FactoredGradient() if on else None  # type: ignore[attr-defined]


def factored_matrices(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, FactoredGradient]]:
    """Yields the matrices that have factored gradients now, with their factors."""
    for parameter in parameters:
        if gradient := getattr(parameter, "factored_grad", None):
            yield parameter, gradient


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x W + b for x [rows, in], W [in, out]; the gradient of W is factored if that is switched on for it."""
    if getattr(weight, "factored_grad", None) is None:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    product: Tensor = _Linear.apply(x, weight)
    return product if bias is None else product + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = grad.to(weight.dtype)  # under autocast a product has lower precision
        _accumulate(weight, x.to(weight.dtype), grad)
        return (grad @ weight.detach().T).to(x.dtype) if ctx.needs_input_grad[0] else None, None


def _accumulate(weight: Any, x: Tensor, g: Tensor) -> None:
    """Adds xᵀ g to the gradient of a matrix, as factors while these are smaller than the matrix."""
    factored: FactoredGradient = weight.factored_grad
    if weight.grad is None and (len(factored) + len(x)) * sum(weight.shape) < weight.numel():
        factored.add(x, g)
        return
    if weight.grad is None:
        weight.grad = factored.dense() if len(factored) else torch.zeros_like(weight)
        factored.clear()
    weight.grad.addmm_(x.T, g)
