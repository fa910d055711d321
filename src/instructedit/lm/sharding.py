"""Sharding of a frozen model's blocks: each process holds a part of the weights, and gathers a block to run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def shard_blocks(blocks: nn.ModuleList, device: torch.device, groups: int, count: int) -> None:
    """Spreads the weights of each block over groups of `count` processes (FSDP2), and moves them to the device.

    The processes of a group must run the same passes on the same rows: gathering a block needs all of them. Weights
    outside of the blocks (embeddings, head) are whole in each process.

    Args:
        blocks: The transformer blocks.
        device: Device that they will run on.
        groups: Number of groups of processes.
        count: Number of processes in a group; they have consecutive ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (groups, count), mesh_dim_names=("data", "lm"))
    for block in blocks:
        fully_shard(block, mesh=mesh["lm"], reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """True if the weights of a block are spread over processes."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def let_go(block: Any) -> None:
    """Releases the gathered weights of a block whose forward pass was stopped early."""
    if is_sharded(block):
        block.reshard()


@contextmanager
def gathered(block: Any) -> Iterator[None]:
    """Gathers a block's weights inside a ``with`` block, for layers of it that run alone."""
    if is_sharded(block):
        block.unshard()
    try:
        yield
    finally:
        let_go(block)
