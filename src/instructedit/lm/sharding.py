"""A frozen model's blocks over several processes: each holds a part of the weights, and gathers a block to run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def shard_blocks(blocks: nn.ModuleList, device: torch.device, groups: int, count: int) -> None:
    """Spreads the weights of each block over groups of `count` processes (FSDP2), and brings them to the device.

    The processes of a group must run the same passes on the same rows: gathering a block needs all of them. What is
    not in a block (embeddings, head) is whole in each.

    Args:
        blocks: The transformer blocks.
        device: Where they are to run.
        groups: Of processes.
        count: Processes of a group; neighbours by rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (groups, count), mesh_dim_names=("data", "lm"))
    for block in blocks:
        fully_shard(block, mesh=mesh["lm"], reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a block are spread over processes."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def let_go(block: Any) -> None:
    """Gives up the gathered weights of a block whose pass was ended before its end."""
    if is_sharded(block):
        block.reshard()


@contextmanager
def gathered(block: Any) -> Iterator[None]:
    """Inside, the block's weights are whole, for layers of it that run alone."""
    if is_sharded(block):
        block.unshard()
    try:
        yield
    finally:
        let_go(block)
