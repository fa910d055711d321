"""Whether half precision saves time here: a CPU without instructions for it takes several times as long."""

from __future__ import annotations

import time
import warnings

import torch
from transformers import PreTrainedModel

#: Parameters from which a model is large enough that the time matters.
LARGE = 50_000_000
#: How many times as long as float32 products may take.
TOLERATED = 2.0
_ROWS, _WIDTH, _TRIES = 256, 768, 3


def warn_if_slow(model: PreTrainedModel, name: str) -> None:
    """Warns of a large model in half precision on a machine without accelerator whose CPU multiplies slowly in it."""
    slow = torch.finfo(model.dtype).bits < 32 and not torch.accelerator.is_available()
    if not slow or model.num_parameters() < LARGE:
        return
    times = slowdown(model.dtype)
    if times > TOLERATED:
        dtype = str(model.dtype).removeprefix("torch.")
        warnings.warn(f"model {name!r}: {dtype} takes {times:.0f} times as long as float32 on this CPU", stacklevel=3)


def slowdown(dtype: torch.dtype) -> float:
    """Measures how many times as long a product takes in a dtype as in float32, in some 20 to 100 ms."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    found = []
    for _ in range(_TRIES + 1):  # the first one also chooses how to multiply
        begun = time.perf_counter()
        torch.nn.functional.linear(a, b)
        found.append(time.perf_counter() - begun)
    return min(found[1:])
