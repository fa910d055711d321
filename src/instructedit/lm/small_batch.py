"""Linear layers on a few rows: BLAS, made for many, takes several times as long as a CPU needs to read the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from instructedit.lm import hooks
from instructedit.lm.sharding import is_sharded

#: Rows of a product, at most, that count as few.
FEW = 64

#: What a layer gives for rows [rows, in], as [rows, out].
Product = Callable[[Tensor], Tensor]


@contextmanager
def small_batch_matmul(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, float32 linear layers on a CPU multiply few rows in an order that suits these.

    Every thread takes its part of the weights. Only the order of sums is another one. Where a gradient may be wanted
    the layers multiply as ever.
    """
    threads, modules = torch.get_num_threads(), list(modules)
    with ExitStack() as stack:
        for layer in () if any(map(is_sharded, modules)) else modules:  # what is gathered goes again
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
    """W x + b, W stored [out, in]: outputs are dealt out to the threads."""
    features, size = weight.shape
    parts = math.gcd(threads, features)
    apart = weight.view(parts, -1, size)

    def product(inputs: Tensor) -> Tensor:
        out = torch.bmm(apart, inputs.T.expand(parts, -1, -1)).view(features, -1).T.contiguous()
        return out if bias is None else out.add_(bias)

    return product


def _conv1d(weight: Tensor, bias: Tensor, threads: int) -> Product:
    """The same, W stored [in, out]: inputs are dealt out, and their parts of the outputs summed up."""
    size, features = weight.shape
    parts = math.gcd(threads, size)
    apart = weight.view(parts, -1, features)

    def product(inputs: Tensor) -> Tensor:
        return torch.bmm(inputs.view(-1, parts, size // parts).transpose(0, 1), apart).sum(0).add_(bias)

    return product


#: By the very class: one derived from it may multiply in its own way.
_PRODUCTS: dict[type[nn.Module], Callable[..., Product]] = {nn.Linear: _linear, Conv1D: _conv1d}
