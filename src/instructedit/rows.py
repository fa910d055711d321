"""Rows of a tensor by their numbers, with a gradient that is the same in every run; and the dtype of statistics."""

from __future__ import annotations

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
