"""What several processes that train or test one editor must do alike, and which of them do the same work.

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
    """Whether this process is one of several (`torch.distributed`)."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def groups_of(count: int) -> int:
    """How many groups of `count` processes there are; from now on those of a group are copies.

    Raises:
        UserError: If there is one process alone, or their number is no multiple of `count`.
    """
    global _copies
    world = distributed.get_world_size() if several() else 1
    if world % count:
        advice = "start a multiple of that number (--trainer.devices, --trainer.strategy ddp)"
        raise UserError(f"lm: shards is {count}, and there are {world} processes: {advice}")
    _copies = count
    return world // count


def copies() -> int:
    """How many processes do the same work."""
    return _copies if several() else 1


def place_among(rank: int, world: int) -> tuple[int, int]:
    """Which share of the records a process takes, of how many shares: copies take the same."""
    return rank // copies(), world // copies()


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes that are no copies; they call this together. Without gradients."""
    value = value.detach().clone()
    if several():
        distributed.all_reduce(value)
        value /= copies()
    return value


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, which call this together; without gradients."""
    shares = distributed.get_world_size() // copies() if several() else 1
    return sum_over_processes(value) / shares


def from_all(rows: list[_T]) -> list[_T]:
    """The rows of all processes, those of copies once; they call this together."""
    if not several():
        return rows
    parts: list[list[_T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, rows)
    return [row for part in parts[:: copies()] for row in part]
