"""What several processes that train one editor must do alike: sums over all of them."""

from __future__ import annotations

from torch import Tensor, distributed


def several() -> bool:
    """Whether this process is one of several (`torch.distributed`)."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, which call this together; without gradients."""
    value = value.detach().clone()
    if several():
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value
