"""Gradients of large matrices as products of a few rows: ∇W = Xᵀ G, not made before an optimiser needs it.

What MEND uses of the LM's gradient (rank ≤ tokens; its section 3.1) holds for the hypernetwork's own gradient too: a
step that sees t tokens gives each of its matrices a gradient of rank t at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Products:
    """Σ_k x_kᵀ g_k of one matrix [in, out]: what its gradient is the sum of."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._g: list[Tensor] = []

    def __len__(self) -> int:
        """How many rows."""
        return sum(map(len, self._x))

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds xᵀ g; `x` [rows, in] is kept as it is, `g` [rows, out] too."""
        self._x.append(x)
        self._g.append(g)

    def clear(self) -> None:
        """Forgets all rows."""
        self._x, self._g = [], []

    def scale(self, factor: Tensor) -> None:
        """Multiplies the gradient by a number."""
        self._g = [g * factor for g in self._g]

    def square(self) -> Tensor:
        """‖∇W‖², without ∇W: the sum of (X Xᵀ) ∘ (G Gᵀ)."""
        x, g = torch.cat(self._x), torch.cat(self._g)
        return ((x @ x.T) * (g @ g.T)).sum()

    def dense(self) -> Tensor:
        """∇W, [in, out]."""
        first, *others = zip(self._x, self._g, strict=True)
        total = first[0].T @ first[1]
        for x, g in others:
            total.addmm_(x.T, g)
        return total


def factor_gradients(parameters: Iterable[nn.Parameter], on: bool = True) -> None:
    """From now on matrices among the parameters hold their gradients as products, or no longer do.

    Only what `linear` multiplies by them is held so; other uses give a ``grad`` as ever.
    """
    for parameter in parameters:
        if parameter.ndim == 2:
            parameter.products = Products() if on else None  # type: ignore[attr-defined]


def held(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Products]]:
    """The matrices that hold rows now."""
    for parameter in parameters:
        if products := getattr(parameter, "products", None):
            yield parameter, products


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The affine map x W + b of x [rows, in], W [in, out]; a W that holds products gets its gradient as such."""
    if getattr(weight, "products", None) is None:
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
        grad = grad.to(weight.dtype)  # under autocast a product is of fewer bits
        _take(weight, x.to(weight.dtype), grad)
        return (grad @ weight.detach().T).to(x.dtype) if ctx.needs_input_grad[0] else None, None


def _take(weight: Any, x: Tensor, g: Tensor) -> None:
    """Adds xᵀ g to the gradient of a matrix: as rows, as long as these are smaller than the matrix."""
    products: Products = weight.products
    if weight.grad is None and (len(products) + len(x)) * sum(weight.shape) < weight.numel():
        products.add(x, g)
        return
    if weight.grad is None:
        weight.grad = products.dense() if len(products) else torch.zeros_like(weight)
        products.clear()
    weight.grad.addmm_(x.T, g)
