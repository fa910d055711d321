"""The project's own commands. Each is a typed function: its signature and docstring are its ``--help``."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from instructedit.console import console
from instructedit.errors import UserError

__all__ = ["benchmark", "covariance", "edit", "experiment", "pretrain"]


def _command(function: Callable[..., None], args: list[str], positional: bool = False) -> int:
    prog = f"instructedit {function.__name__.strip('_')}"
    try:
        auto_cli(function, args=args, as_positional=positional, prog=prog, exit_on_error=False)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    return 0


def benchmark(args: list[str]) -> int:
    """Time the engine beside a plain implementation on this machine."""
    return _command(_benchmark, args)


def edit(args: list[str]) -> int:
    """Make one edit and see what the model says before and after."""
    return _command(_edit, args)


def covariance(args: list[str]) -> int:
    """Measure what an LM's layers see over plain text, for ROME and MEMIT."""
    return _command(_covariance, args)


def experiment(args: list[str]) -> int:
    """Run a whole experiment: fit, test, tables, figures (`demo` is the main job)."""
    return _command(_experiment, args, positional=True)


def pretrain(args: list[str]) -> int:
    """Make an embedded tiny LM from its recipe."""
    return _command(_pretrain, args)


def _edit(
    prompt: str,
    target: str,
    editor: str,
    lm: str = "tiny",
    task: str | None = None,
    subject: str | None = None,
    description: str | None = None,
    slots: dict[str, str] | None = None,
    ask: list[str] | None = None,
    max_new_tokens: int = 12,
    save: str | None = None,
    merge: str | None = None,
) -> None:
    """Edits what a model says, and shows its words before and after.

    Args:
        prompt: What the model is asked.
        target: What it should say.
        editor: A trained editor (folder, checkpoint or hub id), or the name of a method that needs no training.
        lm: tiny, tiny-llama, a local folder, or a hub id.
        task: Name of the editing task, for editors that read instructions.
        subject: The entity in the prompt that the edit is about, for ROME and MEMIT.
        description: Id of the instruction's description; by default one that training uses, always the same.
        slots: Values of the task's instruction slots, e.g. '{"LABEL": "positive", "TOPIC": "tea"}'.
        ask: Further prompts to ask before and after.
        max_new_tokens: Length of the answers.
        save: Folder to save the edit to (a LoRA adapter, for edits of low rank).
        merge: Folder to save a plain transformers model with the edit in its weights to.
    """
    import instructedit as ie

    model = ie.FrozenLM.from_pretrained(lm)
    built = editor in ie.editor_names() or not (Path(editor).exists() or "/" in editor)
    method = ie.build_editor(editor, model) if built else ie.load_editor(editor, model)
    if built and method.trainable:
        raise UserError(f"editor {editor!r} must be trained first: give --editor a run's folder or checkpoint")
    request = ie.EditRequest(prompt, target, task=task, subject=subject, slots=slots or {})
    change = method.edit([request], description=description)
    prompts = [prompt, *(ask or [])]
    before = model.generate(prompts, max_new_tokens=max_new_tokens)
    with model.edited(change, rows=[0] * len(prompts)):
        after = model.generate(prompts, max_new_tokens=max_new_tokens)
    _show_words(prompts, before, after)
    if save:
        change.save_pretrained(save, base_model=lm)
    if merge:
        model.merge(change).save_pretrained(merge)
        model.tokenizer.save_pretrained(merge)


def _show_words(prompts: list[str], before: list[str], after: list[str]) -> None:
    from rich.table import Table

    table = Table("prompt", "before", "after")
    for row in zip(prompts, before, after, strict=True):
        table.add_row(*(text.strip() for text in row))
    console().print(table)


def _benchmark(
    shapes: list[str] | None = None,
    json: str | None = None,
    rank: int = 1920,
    edits: int = 32,
    repeats: int = 5,
    fluency_tokens: int = 100,
    threads: int = 2,
    device: str = "cpu",
    many: bool = False,
) -> None:
    """Training, evaluation, one edit's latency and peak memory: the engine beside a plain implementation.

    Both have the same random weights, records, hypernetwork rank and threads, and run in turn; rates are medians. The
    plain one makes one edit at a time, with whole forward passes, logits at every position and dense updates.

    Args:
        shapes: Of 6x256, 12x768, 48-narrow, 4x512-gated; on a GPU also gpt2-xl and llama-2-7b. The small four by
            default, all on a GPU.
        json: File for all figures and the machine's description.
        rank: Of the hypernetwork.
        edits: Edits in a run, and in a batch of the engine.
        repeats: Runs of each.
        fluency_tokens: Length of sampled text in evaluation.
        threads: CPU threads.
        device: cpu, cuda, ….
        many: Also the cost of each edit from 10 edits to 10,000, at the first of the shapes.
    """
    from instructedit.benchmark.run import SHAPES, Setting, many_edits, measure, report

    chosen = shapes or [name for name, shape in SHAPES.items() if device != "cpu" or not shape.gpu]
    settings = [Setting(name, rank, edits, fluency_tokens, device, threads) for name in chosen]
    rows = [row for setting in settings for row in measure(setting, repeats)]
    report(rows, many_edits(settings[0]) if many else [], settings[0], json)


def _covariance(
    lm: str = "tiny",
    editor: Literal["rome", "memit"] = "rome",
    text: str = "tiny",
    tokens: int = 100_000,
    blocks: list[int] | None = None,
    site_names: list[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Computes the second moments C = E[u uᵀ] that ROME and MEMIT need, once; they are kept on disk.

    Kept under $INSTRUCTEDIT_CACHE (by default ~/.cache/instructedit), for each model, layer, text and number of tokens.
    The text is streamed, so any length fits. Editors with the same options find them there.

    Args:
        lm: tiny, tiny-llama, a local folder, or a hub id.
        editor: Whose layers; the other options are those of that editor.
        text: tiny (the embedded corpus), a file (.txt, blank lines part the texts; or .jsonl with a field "text"; also
            as .gz or .xz), or a dataset on the hub.
        tokens: So many tokens of it.
        blocks: Blocks, negative from the top; by default as far up as in the method's paper.
        site_names: Names or patterns of the layers within them; by default the output projections.
        dtype: Of the LM's weights and forward pass.
        device: Where the LM runs, e.g. cuda.
    """
    import instructedit as ie
    from instructedit.lm.moments import moments_file, second_moments

    model = ie.FrozenLM.from_pretrained(lm, dtype, device)
    method = ie.build_editor(editor, model, text=text, tokens=tokens, blocks=blocks, site_names=site_names)
    names = [site.name for site in method.sites]
    known = [name for name in names if moments_file(model, name, text, tokens).is_file()]
    for name, moment in second_moments(model, names, text, tokens).items():
        size = moments_file(model, name, text, tokens).stat().st_size / 1e6
        state = "was there" if name in known else "computed"
        print(f"{name}: {moment.shape[0]} × {moment.shape[1]}, {size:.1f} MB, {state}, trace {moment.trace():.4g}")


def _pretrain(
    out: str,
    architecture: Literal["gpt2", "llama"] = "gpt2",
    passes: int = 60,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Makes an embedded LM: corpus, tokenizer, training, recall. A cut-off run goes on where it stopped.

    Args:
        out: Folder of the finished model.
        architecture: gpt2 or llama.
        passes: Times over all facts.
        seed: Of the corpus, the weights and the order.
        threads: CPU threads.
    """
    import torch

    from instructedit.lm.pretrain import Recipe, pretrain

    if threads:
        torch.set_num_threads(threads)
    recall = pretrain(Recipe(architecture=architecture, passes=passes, seed=seed), out)
    for name, share in recall.items():
        print(f"recall {name:<8} {100 * share:5.1f} %")


def _experiment(
    name: str,
    scale: str = "tiny",
    seeds: list[int] | None = None,
    rows: list[str] | None = None,
    root: str = "mlruns",
    out: str | None = None,
    overrides: list[str] | None = None,
    fresh: bool = False,
) -> None:
    """Runs the rows of ``experiments/<name>/grid.yaml`` and puts them side by side.

    What the store has already is used again, so that a killed experiment goes on where it stopped: runs that are
    whole, and were made by the same options, configs and code.

    Args:
        name: Of the experiment's folder under experiments/.
        scale: Which LM and hyper-parameters; one of the grid's scales.
        seeds: One run of every row for each; the grid's own by default.
        rows: Only these rows of the grid.
        root: Folder of the MLflow store.
        out: Folder for tables and figures; outputs/<name> by default.
        overrides: Further options for every run, e.g. '["--trainer.max_steps=20"]'.
        fresh: Run everything anew, for instance because a dataset or a local LM has changed.
    """
    from instructedit.experiment import Experiment

    Experiment.load(name, scale, seeds, rows, root, out, overrides, fresh).run()
