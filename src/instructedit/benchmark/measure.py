"""Measurement of training, evaluation, latency and memory: the engine and the plain implementation run in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from instructedit.benchmark.bench import ACCUMULATE, Bench, Setting, parts
from instructedit.benchmark.memory import in_own_process, monitored_memory, peak_memory
from instructedit.benchmark.roofline import Rates, counted
from instructedit.evaluation import Evaluation, evaluate_batch
from instructedit.records import EditRecord
from instructedit.tasks import load_records

#: What is measured → its unit and its variants: `Bench` has a method ``<name>_<variant>`` for each.
MEASURES = {
    "train": ("examples/s", ("plain", "cold", "warm", "lean")),
    "evaluate": ("edits/s", ("plain", "cold", "warm", "lean")),
    "one": ("edits/s", ("plain", "cold", "warm")),
}

#: Edits that warm up a new process, until its code is loaded and its allocator filled; they are not counted.
SETTLED = 120


def measure(setting: Setting, repeats: int = 5, names: Iterable[str] = MEASURES) -> list[dict[str, Any]]:
    """Times every variant of every measure in alternating runs, with ratios and the share of the floor.

    Returns:
        One row for each measure and variant: ``shape, measure, variant, unit, rate`` (median), ``ratio`` to plain (the
        median of the ratios run by run), ``gflop`` and ``gbyte`` per run, ``floor_share`` (time that these take at
        the machine's measured rates ÷ time taken), and ``memory_mb`` above LM, editor and Adam.
    """
    bench, rows = Bench(setting), []
    rates = machine_rates(setting)
    parameters = sum(p.numel() for p in bench.editor.parameters())
    for name in tqdm(list(names), setting.shape):
        unit, variants = MEASURES[name]
        runs: dict[str, list[float]] = {variant: [] for variant in variants}
        work = {variant: counted(partial(bench.run, name, variant), rates) for variant in variants}  # and warms up
        for _ in range(repeats):
            for variant in variants:
                runs[variant].append(_seconds(partial(bench.run, name, variant), setting))
        edits = {"train": len(bench.records), "evaluate": len(bench.tested), "one": 1}[name]
        for variant in variants:
            steps = {"plain": len(bench.records) // ACCUMULATE}.get(variant, 1) if name == "train" else 0
            # Adam reads weight, gradient and two moments and writes three of them.
            moved = steps * parameters * 4 * 7
            seconds = statistics.median(runs[variant])
            rows.append({
                "shape": setting.shape, "measure": name, "variant": variant, "unit": unit,
                "rate": edits / seconds, "seconds": runs[variant],
                "ratio": statistics.median(p / v for p, v in zip(runs["plain"], runs[variant], strict=True)),
                "gflop": work[variant].flops / 1e9, "gbyte": (work[variant].bytes + moved) / 1e9,
                "floor_share": (work[variant].seconds + moved / rates.copy) / seconds,
                "memory_mb": peak_memory(setting, name, variant),
            })  # fmt: skip
    return rows


def _seconds(run: Callable[[], None], setting: Setting) -> float:
    _wait(setting)
    start = time.perf_counter()
    run()
    _wait(setting)
    return time.perf_counter() - start


def _wait(setting: Setting) -> None:
    if setting.device.startswith("cuda"):
        torch.cuda.synchronize()


def machine_rates(setting: Setting, seconds: float = 1.0) -> Rates:
    """Measures the machine's best rates, that of matrix products in the LM's dtype."""
    size = 8192 if setting.device.startswith("cuda") else 1536
    kind = getattr(torch, setting.model.dtype)
    a, b = (torch.randn(size, size, device=setting.device, dtype=kind) for _ in range(2))
    source = torch.zeros(64 << 20, device=setting.device)
    target = torch.empty_like(source)
    return Rates(
        2 * size**3 / _best(lambda: torch.mm(a, b), setting, seconds),
        source.nbytes / _best(source.sum, setting, seconds),
        2 * source.nbytes / _best(lambda: target.copy_(source), setting, seconds),
    )


def _best(run: Callable[[], Any], setting: Setting, seconds: float) -> float:
    run()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        best = min(best, _seconds(run, setting))
    return best


def many_edits(setting: Setting, counts: Sequence[int]) -> list[dict[str, float]]:
    """Measures time per edit and peak memory for each number of edits, made and scored batch by batch, without cache.

    The edits are those of ten records again and again, with nothing cached: longer prompts would cost more, and hide
    whether something accumulates. Each count has a process of its own, which returns freed memory at once: without
    that, the peak is mostly what glibc keeps, and with it an edit takes somewhat longer.
    """
    return [in_own_process(_so_many_edits, setting, count) for count in counts]


def _so_many_edits(setting: Setting, count: int) -> dict[str, float]:
    bench = Bench(setting)
    bench.lm.cache.max_bytes = bench.lm.prefixes.prompt_prefixes.max_bytes = 0
    records = [record for task in ("counterfact", "zsre") for record in load_records(task, "tiny", "train")[0][:5]]
    quick = Evaluation(generate=False, fluency_tokens=0)

    def edit(stream: Sequence[Sequence[EditRecord]]) -> None:
        for part in tqdm(stream, f"{count} edits", unit="batch", leave=False):
            with bench.precision():
                evaluate_batch(bench.lm, bench.editor, part, quick)

    edit(_around(records, SETTLED, bench.size))
    with monitored_memory(setting) as peak:
        start = time.perf_counter()
        edit(_around(records, count, bench.size))
        seconds = time.perf_counter() - start
    return {"edits": count, "ms_per_edit": 1000 * seconds / count, "memory_mb": peak()}


def _around(records: Sequence[EditRecord], count: int, size: int) -> list[Sequence[EditRecord]]:
    """Returns `count` records in batches, starting again from the first record after the last one."""
    return parts([records[i % len(records)] for i in range(count)], size)
