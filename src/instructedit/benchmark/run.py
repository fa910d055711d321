"""The benchmark: training, evaluation, latency and memory of the engine beside the plain implementation."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from instructedit.benchmark.plain import PlainMend
from instructedit.console import console
from instructedit.data.batch import Collator, EditBatch
from instructedit.editors import build_editor
from instructedit.editors.losses import LossWeights
from instructedit.editors.mend import Mend
from instructedit.errors import UserError
from instructedit.evaluation import Evaluation, evaluate_batch
from instructedit.lm import FrozenLM
from instructedit.lm.loading import load_model
from instructedit.lm.pretrain import Recipe, new_model
from instructedit.provenance import provenance
from instructedit.records import EditRecord
from instructedit.tasks import load_records

WEIGHTS = LossWeights(edit=0.1, locality=1.0)
#: Gradient accumulation of the plain training (the paper's).
ACCUMULATE = 2


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        architecture: Sort of blocks.
        layers, width, heads, vocab: Its size.
        dtype: Of the LM.
        gpu: Whether it is meant for a GPU alone.
    """

    architecture: Literal["gpt2", "llama"]
    layers: int
    width: int
    heads: int
    vocab: int = 50257
    dtype: str = "float32"
    gpu: bool = False


SHAPES = {
    "6x256": Shape("gpt2", 6, 256, 4),
    "12x768": Shape("gpt2", 12, 768, 12),
    "48-narrow": Shape("gpt2", 48, 256, 4),
    "4x512-gated": Shape("llama", 4, 512, 8, 32000),
    "gpt2-xl": Shape("gpt2", 48, 1600, 25, dtype="bfloat16", gpu=True),
    "llama-2-7b": Shape("llama", 32, 4096, 32, 32000, dtype="bfloat16", gpu=True),
}


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        shape: One of `SHAPES`.
        rank: Of the hypernetwork (paper: 1920).
        edits: Edits in a run, and in a batch of the engine.
        fluency_tokens: Length of sampled text in evaluation.
        device: Where it runs.
        threads: CPU threads.
    """

    shape: str
    rank: int = 1920
    edits: int = 32
    fluency_tokens: int = 100
    device: str = "cpu"
    threads: int = 2


class Bench:
    """The same LM, hypernetwork, records and optimiser for both."""

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        shape = SHAPES[setting.shape]
        _, tokenizer = load_model("tiny")
        recipe = Recipe(shape.architecture, 0, 0, shape.width, shape.layers, shape.heads, shape.vocab, 256)
        model = new_model(recipe, tokenizer.eos_token_id).to(getattr(torch, shape.dtype))
        self.setting = setting
        self.lm = FrozenLM(model, tokenizer, setting.shape).to(setting.device)
        torch.manual_seed(0)
        editor = build_editor("mend", self.lm, rank=setting.rank)
        assert isinstance(editor, Mend)
        self.editor = editor
        self.plain = PlainMend(self.lm, editor)
        self.adam = torch.optim.Adam(editor.parameters(), lr=1e-6)
        records = load_records("counterfact", "tiny", "train")[0]
        self.records = [_trimmed(r) for r in records if r.of("locality")][: setting.edits]
        facts, replies = load_records("zsre", "tiny", "test")[0], load_records("convsent", "tiny", "test")[0]
        self.tested = [*facts[: setting.edits * 3 // 4], *replies[: setting.edits // 4]]
        collator = Collator(tokenizer, self.lm.max_length, None)
        self.batch: EditBatch = collator(list(enumerate(self.records))).to(setting.device)

    # -- what is timed ------------------------------------------------------------------------------------------------

    def train_plain(self) -> None:
        """One pass over the records, one at a time."""
        self.editor.train()
        for number, record in enumerate(self.records, 1):
            loss = self.plain.loss(record, WEIGHTS)
            (loss / ACCUMULATE).backward()
            if number % ACCUMULATE == 0:
                self._step()

    def train_cold(self) -> None:
        """The same pass as one batch, the prefix cache empty."""
        self.lm.cache.clear()
        self.train_warm()

    def train_warm(self) -> None:
        """The same pass as one batch."""
        self.editor.train()
        self.editor.objective(self.batch, WEIGHTS)["loss"].backward()
        self._step()

    def _step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.editor.parameters(), 100.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def evaluate_plain(self) -> None:
        """The full metric set of the test records, one at a time."""
        for record in self.tested:
            self.plain.scores(record, self.setting.fluency_tokens)

    def evaluate_warm(self) -> None:
        """The same in one batch."""
        evaluate_batch(self.lm, self.editor, self.tested, Evaluation(fluency_tokens=self.setting.fluency_tokens))

    def evaluate_cold(self) -> None:
        """The same, the prefix cache empty."""
        self.lm.cache.clear()
        self.evaluate_warm()

    def one_plain(self) -> None:
        """One edit, made."""
        record = self.records[0]
        self.editor.eval()
        self.plain.deltas(record.request.prompt, record.request.target)

    def one_cold(self) -> None:
        """The same."""
        self.lm.cache.clear()
        self.editor.edit([self.records[0].request])

    def one_warm(self) -> None:
        """The same, its prompt known."""
        self.editor.edit([self.records[0].request])


def _trimmed(record: EditRecord) -> EditRecord:
    """With the probes that one training example has: one rephrasing and two of locality."""
    return replace(record, probes=record.of("generalization")[:1] + record.of("locality")[:2])


#: What is measured → its unit, the edits in a run, and which of two sorts of run it is (`Bench` has <name>_plain, …).
MEASURES = {"train": "examples/s", "evaluate": "edits/s", "one": "edits/s"}
VARIANTS = ("plain", "cold", "warm")


def measure(setting: Setting, repeats: int = 5, names: tuple[str, ...] = tuple(MEASURES)) -> list[dict[str, Any]]:
    """Rates of every measure and variant, in alternating runs, with ratios and the share of the floor.

    Returns:
        One row for each measure and variant: ``shape, measure, variant, unit, rate`` (median), ``ratio`` to plain (the
        median of the ratios run by run), ``gflop`` a run, ``floor_share`` (time that its FLOPs and bytes take at the
        machine's measured rates ÷ time taken), and ``memory_mb`` above LM, editor and Adam.
    """
    if setting.shape not in SHAPES:
        raise UserError(f"benchmark: no shape {setting.shape!r}; there are: {', '.join(SHAPES)}")
    bench, rows = Bench(setting), []
    flops, bandwidth = machine_rates(setting)
    parameters = sum(p.numel() for p in bench.editor.parameters())
    for name in names:
        runs: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for variant in VARIANTS:  # once each, not counted
            getattr(bench, f"{name}_{variant}")()
        for _ in range(repeats):
            for variant in VARIANTS:
                runs[variant].append(_seconds(getattr(bench, f"{name}_{variant}"), setting))
        edits = {"train": len(bench.records), "evaluate": len(bench.tested), "one": 1}[name]
        for variant in VARIANTS:
            with FlopCounterMode(display=False) as counter:
                getattr(bench, f"{name}_{variant}")()
            work = counter.get_total_flops()
            steps = {"plain": len(bench.records) // ACCUMULATE}.get(variant, 1) if name == "train" else 0
            # Adam reads weight, gradient and two moments and writes three of them; the gradient is written once.
            moved = steps * parameters * 4 * 8
            seconds = statistics.median(runs[variant])
            rows.append({
                "shape": setting.shape, "measure": name, "variant": variant, "unit": MEASURES[name],
                "rate": edits / seconds, "seconds": runs[variant],
                "ratio": statistics.median(p / v for p, v in zip(runs["plain"], runs[variant], strict=True)),
                "gflop": work / 1e9, "gbyte": moved / 1e9,
                "floor_share": (work / flops + moved / bandwidth) / seconds,
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


def machine_rates(setting: Setting, seconds: float = 1.0) -> tuple[float, float]:
    """What the machine does at best: FLOP/s of a large matrix product in the LM's dtype, and bytes/s of a copy."""
    size = 8192 if setting.device.startswith("cuda") else 1536
    kind = getattr(torch, SHAPES[setting.shape].dtype)
    a, b = (torch.randn(size, size, device=setting.device, dtype=kind) for _ in range(2))
    source = torch.empty(64 << 20, device=setting.device)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b), setting, seconds)
    copy = _best(lambda: target.copy_(source), setting, seconds)
    return 2 * size**3 / product, 2 * source.nbytes / copy


def _best(run: Callable[[], Any], setting: Setting, seconds: float) -> float:
    run()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        best = min(best, _seconds(run, setting))
    return best


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_memory(setting: Setting, name: str, variant: str) -> float:
    """Most memory of a run above what LM, editor and Adam hold, in MB, in a process of its own; nan where unknown."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=_peak, args=(setting, name, variant, queue))
    process.start()
    try:
        return float(queue.get(timeout=1800))
    finally:
        process.join()


def _peak(setting: Setting, name: str, variant: str, queue: Any) -> None:
    found = float("nan")
    try:
        bench = Bench(setting)
        for parameter in bench.editor.parameters():  # Adam's moments are the editor's own state
            parameter.grad = torch.zeros_like(parameter)
        bench.adam.step()
        bench.adam.zero_grad(set_to_none=True)
        with _watched(setting) as peak:
            getattr(bench, f"{name}_{variant}")()
        found = peak()
    finally:
        queue.put(found)


@contextmanager
def _watched(setting: Setting) -> Iterator[Callable[[], float]]:
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


# -- many edits -------------------------------------------------------------------------------------------------------


def many_edits(setting: Setting, counts: tuple[int, ...] = (10, 100, 1000, 10_000)) -> list[dict[str, float]]:
    """Seconds and peak memory for each edit, from few edits to many: made and scored batch by batch, nothing kept."""
    bench = Bench(setting)
    records: list[EditRecord] = [r for task in ("counterfact", "zsre") for r in load_records(task, "tiny", "train")[0]]
    quick = Evaluation(generate=False, fluency_tokens=0)
    rows = []
    for count in counts:
        stream = [records[i % len(records)] for i in range(count)]
        bench.lm.cache.clear()
        with _watched(setting) as peak:
            start = time.perf_counter()
            for first in range(0, count, setting.edits):
                evaluate_batch(bench.lm, bench.editor, stream[first : first + setting.edits], quick)
            seconds = time.perf_counter() - start
        rows.append({"edits": count, "ms_per_edit": 1000 * seconds / count, "memory_mb": peak()})
    return rows


# -- the report -------------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]], many: list[dict[str, float]], setting: Setting, file: str | None) -> None:
    """Prints the table and writes everything as JSON."""
    from rich.table import Table

    table = Table(
        "shape", "measure", "variant", "rate", "× plain", "GFLOP", "share of floor", "peak MB", "memory ÷ plain"
    )
    plain = {(r["shape"], r["measure"]): r["memory_mb"] for r in rows if r["variant"] == "plain"}
    for row in rows:
        table.add_row(
            row["shape"], row["measure"], row["variant"], f"{row['rate']:.2f} {row['unit']}", f"{row['ratio']:.2f}",
            f"{row['gflop']:.0f}", f"{100 * row['floor_share']:.0f} %", f"{row['memory_mb']:.0f}",
            f"{row['memory_mb'] / plain[row['shape'], row['measure']]:.2f}",
        )  # fmt: skip
    console().print(table)
    for each in many:
        console().print(
            f"{each['edits']:>6} edits: {each['ms_per_edit']:.1f} ms an edit, peak {each['memory_mb']:.0f} MB"
        )
    if file:
        facts = {"machine": {**provenance(), "processor": platform.processor()}, "setting": asdict(setting)}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps({**facts, "rows": rows, "many_edits": many}, indent=1) + "\n")
