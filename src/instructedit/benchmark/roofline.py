"""Floor of a run's work: the FLOPs of its matrix products, and the bytes of matrices too large for a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

#: Size in bytes below which a tensor may still be in a cache when it is read: its bytes do not count.
CACHED = 4 << 20
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


class Rates(NamedTuple):
    """The machine's best rates: FLOP/s of a matrix product, bytes/s read in a sum, and bytes/s moved by a copy."""

    flops: float
    read: float
    copy: float


@dataclass
class Work:
    """Work counted in a run.

    Attributes:
        flops: FLOPs of all matrix products.
        bytes: Bytes of the large matrices that they read or write.
        seconds: The least time of the products one by one: each takes that of its FLOPs or of its bytes, whichever is
            longer.
    """

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0


def counted(run: Callable[[], Any], rates: Rates) -> Work:
    """Runs a function and counts the work of its matrix products."""
    work = Work()

    def formula(product: Any) -> Callable[..., int]:
        def count(*args: Any, out_val: Tensor, **kwargs: Any) -> int:
            flops = int(flop_registry[product](*args, out_val=out_val))
            moved = sum(t.nbytes for t in (*args, out_val) if isinstance(t, Tensor) and t.nbytes >= CACHED)
            work.flops += flops
            work.bytes += moved
            work.seconds += max(flops / rates.flops, moved / rates.read)
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # the counter gets tensors, not their shapes
        return count

    with FlopCounterMode(display=False, custom_mapping={product: formula(product) for product in PRODUCTS}):
        run()
    return work
