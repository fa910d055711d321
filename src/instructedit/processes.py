"""Helpers for several processes that train or test one editor: shares of the records, and sums over processes.

Where the LM is sharded over groups of processes (`FrozenLM.shard`), the processes of a group see the same records: they
are *copies* of one another, and count once.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, distributed

from instructedit.errors import UserError

_T = TypeVar("_T")
_copies = 1


def several() -> bool:
    """True if this process is one of several (`torch.distributed`)."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def groups_of(count: int) -> int:
    """Divides the processes into groups of `count`, each made of copies from now on; returns the number of groups.

    Raises:
        UserError: If the number of processes is not a multiple of `count`.
    """
    global _copies
    world = distributed.get_world_size() if several() else 1
    if world % count:
        advice = "start a multiple of that number (--trainer.devices, --trainer.strategy ddp)"
        raise UserError(f"lm: shards is {count}, and there are {world} processes: {advice}")
    _copies = count
    return world // count


def copies() -> int:
    """Returns the number of processes that do the same work."""
    return _copies if several() else 1


def place_among(rank: int, world: int) -> tuple[int, int]:
    """Returns which share of the records a process takes, and the number of shares; copies take the same share."""
    return rank // copies(), world // copies()


def sum_over_processes(value: Tensor) -> Tensor:
    """Sums a tensor over all processes, which call this together, counting copies once; without gradients."""
    value = value.detach().clone()
    if several():
        distributed.all_reduce(value)
        value /= copies()
    return value


def mean_over_processes(value: Tensor) -> Tensor:
    """Averages a tensor over all processes, which call this together; without gradients."""
    shares = distributed.get_world_size() // copies() if several() else 1
    return sum_over_processes(value) / shares


def from_all(rows: list[_T]) -> list[_T]:
    """Collects the rows of all processes, which call this together; the rows of copies come once."""
    if not several():
        return rows
    parts: list[list[_T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, rows)
    return [row for part in parts[:: copies()] for row in part]
