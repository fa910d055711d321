"""Selection of a tensor's rows with a gradient that is the same in every run; and the dtype of statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Takes rows by their indices, [n, …] and [m] → [m, …], like ``tensor[index]``.

    The gradient of a row that is taken more than once is the sum over its copies. On a CPU, the threads of
    ``tensor[index]`` add these in no fixed order, so that two equal runs differ in the last digits; those of
    ``index_select`` have a fixed order, and take half the time. On a GPU it is the other way round.
    """
    return tensor[index] if tensor.is_cuda else tensor.index_select(0, index)


def in_full(tensor: Tensor) -> Tensor:
    """Converts a tensor to float32, or leaves it in float64: statistics and losses are never in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
