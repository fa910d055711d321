"""How much memory something takes at its peak."""

from __future__ import annotations

import gc
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from instructedit.benchmark.bench import Bench, Setting


def peak_memory(setting: Setting, name: str, variant: str) -> float:
    """Most memory of a run above what LM, editor and Adam hold, in MB, in a process of its own; nan where unknown.

    Of the second run: what the first one loads or leaves in the prefix cache (unless `variant` is cold) does not count.
    A process that fails is said and gives nan: what was timed before it is not lost.
    """
    try:
        return float(in_own_process(_peak, setting, name, variant))
    except RuntimeError as error:
        warnings.warn(f"no peak memory of {name} {variant}: {error}", stacklevel=2)
        return float("nan")


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of a module gives in a fresh process that gives freed memory back at once.

    Raises:
        RuntimeError: If that process ends without a result; its own traceback is on the terminal.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, *args))
    with _returned():
        process.start()
    theirs.close()  # else a process that died would be waited for
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {function.__name__} ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def _answer(pipe: Any, function: Callable[..., Any], *args: Any) -> None:
    pipe.send(function(*args))


@contextmanager
def _returned() -> Iterator[None]:
    """Processes that start within give freed memory back at once (glibc): their peak is of what is in use.

    Tensors below the bound may find room that others left, and then do not count; a lower one makes too many calls.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(32 << 10)
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _peak(setting: Setting, name: str, variant: str) -> float:
    if variant == "plain":  # whose edits come one by one, however many
        setting = replace(setting, edits=min(setting.edits, 4))
    bench = Bench(setting)
    bench.run(name, variant)  # makes Adam's moments, and loads the code: neither is counted
    if variant == "cold":
        bench.lm.forget()
    gc.collect()
    with watched(setting) as peak:
        bench.run(name, variant)
    return peak()


@contextmanager
def watched(setting: Setting) -> Iterator[Callable[[], float]]:
    """Gives a function that tells the peak within, in MB above the start."""
    if setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - start) / 1e6
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    yield lambda: (_status("VmHWM") - before) / 1e3


def _status(key: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return float("nan")
    return next(float(line.split()[1]) for line in lines if line.startswith(key))
