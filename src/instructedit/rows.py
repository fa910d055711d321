"""Rows of a tensor by their numbers, with a gradient that is the same in every run."""

from __future__ import annotations

from torch import Tensor


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Takes rows by their numbers, [n, …] and [m] → [m, …], like ``tensor[index]``.

    A row that is taken more than once adds up the gradients of its copies. The threads of a CPU add those of
    ``tensor[index]`` in the order in which they come, so that two equal runs differ in the last digits; those of
    ``index_select`` have one order, and take half the time. On a GPU it is the other way round.
    """
    return tensor[index] if tensor.is_cuda else tensor.index_select(0, index)
