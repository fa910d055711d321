"""Measurement of peak memory, in processes of their own."""

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
    """Measures a run's peak memory above LM, editor and Adam, in MB, in a process of its own; NaN if unknown.

    It is that of the second run: what the first one loads or leaves in the prefix cache (unless `variant` is cold) does
    not count. A process that fails gives a warning and NaN, so that earlier timings are not lost.
    """
    try:
        return float(in_own_process(_peak, setting, name, variant))
    except RuntimeError as error:
        warnings.warn(f"no peak memory of {name} {variant}: {error}", stacklevel=2)
        return float("nan")


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a module's function in a new process that returns freed memory at once, and returns its result.

    Raises:
        RuntimeError: If that process ends without a result; its own traceback is on the terminal.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, *args))
    with _returned():
        process.start()
    theirs.close()  # otherwise this would wait for a process that died
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
    """Makes processes that start within the context return freed memory at once (glibc): their peak is of used memory.

    Tensors below the threshold may reuse memory that others left, and then do not count; a lower one makes too many
    calls.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(32 << 10)
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _peak(setting: Setting, name: str, variant: str) -> float:
    if variant == "plain":  # which makes edits one by one, however many
        setting = replace(setting, edits=min(setting.edits, 4))
    bench = Bench(setting)
    bench.run(name, variant)  # creates Adam's moments, and loads the code: neither is counted
    if variant == "cold":
        bench.lm.forget()
    gc.collect()
    with monitored_memory(setting) as peak:
        bench.run(name, variant)
    return peak()


@contextmanager
def monitored_memory(setting: Setting) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the peak memory within the context, in MB above that at its start."""
    if setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - start) / 1e6
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    yield lambda: (_status("VmHWM") - before) / 1e3


def _status(key: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return float("nan")
    return next(float(line.split()[1]) for line in lines if line.startswith(key))
