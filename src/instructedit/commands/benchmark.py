"""Time the engine beside a plain implementation on this machine."""

from __future__ import annotations

from typing import Literal


def main(
    shapes: list[str] | None = None,
    lm: str | None = None,
    json: str | None = None,
    rank: int = 1920,
    edits: int = 32,
    batch: int | None = None,
    tokens: int | None = None,
    instructions: bool = False,
    measures: list[Literal["train", "evaluate", "one"]] | None = None,
    repeats: int = 5,
    fluency_tokens: int = 100,
    threads: int = 2,
    device: str = "cpu",
    many: int = 0,
) -> None:
    """Compares training, evaluation, one edit's latency and peak memory of the engine and a plain implementation.

    Both have the same weights (random ones, or with --lm a real model's), records, hypernetwork rank and threads, and
    run in turn; rates are medians. The plain one makes one edit at a time, with whole forward passes, logits at every
    position and dense updates.

    Args:
        shapes: Shapes of the model, from 6x256, 12x768, 48-narrow, 4x512-gated; on a GPU also gpt2-xl and llama-2-7b.
            By default the small four, or all on a GPU.
        lm: A real model instead: its name, folder or hub id.
        json: File for all figures and the machine's description.
        rank: Rank of the hypernetwork.
        edits: Edits in a run.
        batch: Edits that the engine works on at once; by default what suits the shape.
        tokens: Maximum of tokens in one forward pass of the engine's evaluation; by default what suits the shape.
        instructions: Put an instruction in front of each request and its in-scope probes.
        measures: Only these: train, evaluate, one (a single edit).
        repeats: Timed runs of each variant.
        fluency_tokens: Length of sampled text in evaluation.
        threads: CPU threads.
        device: cpu, cuda, ….
        many: Also measure the cost per edit at the first shape, for 10, 100, … edits up to this number, e.g. 10000.
    """
    from instructedit.benchmark.bench import SHAPES, Setting
    from instructedit.benchmark.measure import MEASURES, many_edits, measure
    from instructedit.benchmark.report import report
    from instructedit.errors import UserError, at_least
    from instructedit.paths import check_writable_file

    at_least(1, rank=rank, edits=edits, batch=batch, tokens=tokens, repeats=repeats, threads=threads)
    if json:
        check_writable_file(json, "--json")
    if unknown := [name for name in shapes or () if name not in SHAPES]:
        raise UserError(f"benchmark: no shape {unknown[0]!r}; there are: {', '.join(SHAPES)}; --lm takes a real model")
    chosen = [*(shapes or ()), *([lm] if lm else [])] or [
        name for name, shape in SHAPES.items() if device != "cpu" or not shape.gpu
    ]
    settings = [
        Setting(name, rank, edits, batch, tokens, instructions, fluency_tokens, device, threads) for name in chosen
    ]
    counts = [10**power for power in range(1, 8) if 10**power <= many]
    found = [row for setting in settings for row in measure(setting, repeats, measures or MEASURES)]
    report(found, many_edits(settings[0], counts) if counts else [], settings[0], json)
