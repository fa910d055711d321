"""Fast linear layers on few rows: BLAS, made for many, takes several times as long as reading the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from instructedit.lm import hooks
from instructedit.lm.sharding import is_sharded

#: Maximum number of rows of a product that count as few.
FEW = 64

#: Maps a layer's inputs [rows, in] to its outputs [rows, out].
Product = Callable[[Tensor], Tensor]


@contextmanager
def small_batch_matmul(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Makes float32 linear layers on a CPU faster for few rows inside a ``with`` block.

    Every thread takes its part of the weights. Only the order of summation differs. Where gradients are enabled, the
    layers multiply as usual.
    """
    threads, modules = torch.get_num_threads(), list(modules)
    with ExitStack() as stack:
        for layer in () if any(map(is_sharded, modules)) else modules:  # gathered weights are released again
            prepared = _PRODUCTS.get(type(layer))
            if prepared and _suits(layer.get_parameter("weight")):
                product = prepared(layer.get_parameter("weight").detach(), layer.bias, threads)
                stack.enter_context(hooks.patched(layer, _forward(layer.forward, product)))
        yield


def _suits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _forward(own: Product, product: Product) -> Product:
    def forward(inputs: Tensor) -> Tensor:
        *shape, size = inputs.shape
        rows = math.prod(shape)
        if not 0 < rows <= FEW or torch.is_grad_enabled():
            return own(inputs)
        return product(inputs.reshape(rows, size)).view(*shape, -1)

    return forward


def _linear(weight: Tensor, bias: Tensor | None, threads: int) -> Product:
    """Prepares W x + b for W stored as [out, in]: outputs are split among the threads."""
    features, size = weight.shape
    parts = math.gcd(threads, features)
    apart = weight.view(parts, -1, size)

    def product(inputs: Tensor) -> Tensor:
        out = torch.bmm(apart, inputs.T.expand(parts, -1, -1)).view(features, -1).T.contiguous()
        return out if bias is None else out.add_(bias)

    return product


def _conv1d(weight: Tensor, bias: Tensor, threads: int) -> Product:
    """Prepares W x + b for W stored as [in, out]: inputs are split among the threads, and partial outputs summed."""
    size, features = weight.shape
    parts = math.gcd(threads, size)
    apart = weight.view(parts, -1, features)

    def product(inputs: Tensor) -> Tensor:
        return torch.bmm(inputs.view(-1, parts, size // parts).transpose(0, 1), apart).sum(0).add_(bias)

    return product


#: Looked up by the exact class: a subclass may multiply in its own way.
_PRODUCTS: dict[type[nn.Module], Callable[..., Product]] = {nn.Linear: _linear, Conv1D: _conv1d}
