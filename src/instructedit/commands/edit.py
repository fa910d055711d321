"""Make one or several edits, and see how each turned out: took, failed, or spread."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from instructedit.configs import Scale
from instructedit.console import console
from instructedit.errors import UserError, at_least
from instructedit.paths import check_writable, check_writable_file

if TYPE_CHECKING:
    from instructedit.editors import Editor
    from instructedit.evaluation import EditSequence
    from instructedit.lm import FrozenLM
    from instructedit.reports import EditCase, EditReport

#: Options that only a sequence uses, and those that it does not use.
_OF_SEQUENCES = ("out", "score_every", "batch_size", "sample")
_OF_REPORTS = ("joint", "json", "html", "keep", "rank", "ask", "max_new_tokens")


@dataclass
class EditCommand:
    """Edits what a model says, and reports whether it took, what follows from it, and what else changed.

    Args:
        editor: A trained editor (folder, checkpoint, a run's id or name, a hub id, or latest: that of the run that
            ended last), or the name of a method that needs no training.
        prompt: What the model is asked.
        target: What it should say.
        requests: A file of several requests, instead of a prompt and a target (.json, .jsonl or .csv with a header):
            prompt, target, and optionally subject, task, rephrase, neighbours, ask; or the folder of a task of your
            own, for its test records. Each is an edit of its own.
        options: Hyper-parameters of a method that needs no training, e.g. '{"lr": 0.005, "bound": 0.02}'; by
            default those of its config at the scale; without a scale the published ones, with step sizes and radii
            that follow the model's own scales. Of a trained editor, those that may change after training, e.g.
            ScopeEdit's '{"reach": 1}'.
        scale: A scale of configs/scale/, or a file of your own, for the LM and the method's hyper-parameters; by
            default the one named after the LM, if there is one.
        lm: tiny, tiny-llama, smollm2-135m, gemma-3-270m, a local folder, a .gguf file, or a hub id; by default the
            scale's, or the one that a trained editor was trained for, or tiny.
        device: Device on which the LM runs, e.g. cuda; by default the CPU.
        dtype: Data type of the LM's weights, e.g. bfloat16; by default float32.
        task: Name of the editing task, or its folder with a task.yaml, for editors that read instructions.
        subject: The entity in the prompt that the edit is about, for ROME and MEMIT.
        description: Id of the instruction's description; by default one that training uses, always the same.
        instruction: A sentence of your own in the description's place, for editors that read instructions; its slots
            are filled.
        slots: Values of the task's instruction slots, e.g. '{"LABEL": "positive", "TOPIC": "tea"}'.
        rephrase: Rephrasings of the prompt, which the target should follow too; by default two are drawn if the
            embedded facts know the relation.
        neighbours: Prompts whose answers should stay; by default ten are drawn from the embedded facts.
        ask: Further prompts to ask before and after.
        joint: Make one edit of all requests.
        sequential: Make one edit after another on a model that carries those before, and show how the metrics change
            with the number of edits: right after each edit, and again at checkpoints.
        score_every: Edits between two checkpoints of a sequence.
        batch_size: Number of requests in each edit of a sequence.
        sample: Maximum number of requests of a sequence that are scored again at the checkpoints; by default all.
        out: Folder for the tables and the figure of a sequence; they are written at every checkpoint.
        text: Plain text on which to measure how far unrelated predictions moved, after an edit or at the checkpoints of
            a sequence: a file, a hub id, or sampled (what the model says itself); by default the embedded sentences.
        max_new_tokens: Length of the answers.
        chat: Ask in the LM's own chat template.
        json: File to write the report to as plain data.
        html: File to write the report to as a page.
        save: Folder to save the edit to (a LoRA adapter, for edits of low rank), with its report and requests;
            several edits are saved to numbered folders in it.
        keep: Name to keep the edit under in a store, for `instructedit edits`; several edits get a number after it.
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
        rank: The largest rank of what is saved or kept; auto is the smallest of 8, 16, 32, 64, … that leaves all
            predicted tokens on what was asked unchanged. By default auto for edits of low rank; dense ones stay dense.
        merge: Folder to save a plain transformers model with the edit in its weights to.
    """

    editor: str
    prompt: str | None = None
    target: str | None = None
    requests: str | None = None
    options: dict[str, Any] | None = None
    scale: str | None = None
    lm: str | None = None
    device: str | None = None
    dtype: str | None = None
    task: str | None = None
    subject: str | None = None
    description: str | None = None
    instruction: str | None = None
    slots: dict[str, str] | None = None
    rephrase: list[str] | None = None
    neighbours: list[str] | None = None
    ask: list[str] | None = None
    joint: bool = False
    sequential: bool = False
    score_every: int = 100
    batch_size: int = 1
    sample: int | None = None
    out: str | None = None
    text: str = "tiny"
    max_new_tokens: int = 12
    chat: bool = False
    json: str | None = None
    html: str | None = None
    save: str | None = None
    keep: str | None = None
    store: str | None = None
    rank: int | Literal["auto"] | None = None
    merge: str | None = None

    def __post_init__(self) -> None:
        self.save, self.merge = (str(Path(p).expanduser()) if p else None for p in (self.save, self.merge))

    def __call__(self) -> None:
        """Runs the command."""
        import instructedit as ie
        from instructedit.tasks import task_name

        _check_targets(self.save, self.merge)
        files = ((self.json, "--json"), (self.html, "--html"))
        reports = [check_writable_file(file, option) if file is not None else None for file, option in files]
        task = task_name(self.task) if self.task else None
        own = (self.prompt, self.target, self.subject, self.slots, self.rephrase, self.neighbours)
        cases = _cases(self.requests, task) if self.requests and not any(own) else [_case(self.requests, task, *own)]
        if self.merge and len(cases) > 1 and not (self.joint or self.sequential):
            raise UserError(f"--merge: a model holds one edit, and there are {len(cases)} requests: add --joint")
        _check_sequence(self)
        if isinstance(self.rank, int):
            at_least(1, rank=self.rank)
        places = _places(self.keep, self.store, 1 if self.joint else len(cases))
        name = self.lm or (None if self.scale else _trained_for(self.editor))
        at = Scale.load(self.scale) if self.scale else Scale.of_model(name or "tiny")
        model = _model(at, name, self.device, self.dtype, self.chat)
        method = _method(self.editor, model, self.options, at)
        if self.merge and not method.changes_weights:
            raise UserError(f"--merge: edits of {method.name!r} are no change of weights, so no model can hold them")
        if self.rank is not None and not method.changes_weights:
            raise UserError(f"--rank: edits of {method.name!r} are no change of weights, so they have no rank")
        if self.sequential:
            _finish_sequence(self, model, _sequence(self, model, method, cases))
            return
        report = ie.edit(
            model, method, cases, joint=self.joint, ask=self.ask or (), text=self.text,
            max_new_tokens=self.max_new_tokens, description=self.description, instruction=self.instruction,
            progress=_progress(f"{method.name} edits and asks"),
        )  # fmt: skip
        _show(report)
        for file, write in zip(reports, (report.save_json, report.save_html), strict=True):
            if file:
                write(file)
        if self.save or self.keep:
            _keep(model, report, self.rank, Path(self.save) if self.save else None, places)
        if self.merge:
            model.merge(report.edits[0]).save_pretrained(self.merge)
            model.tokenizer.save_pretrained(self.merge)


def _cases(requests: str, task: str | None) -> list[EditCase]:
    from instructedit.reports import read_cases

    return read_cases(requests, task)


def _case(
    requests: str | None, task: str | None, prompt: str | None, target: str | None, subject: str | None,
    slots: dict[str, str] | None, rephrase: list[str] | None, neighbours: list[str] | None,
) -> EditCase:  # fmt: skip
    """Makes the case of the one request on the command line."""
    import instructedit as ie

    if requests:
        raise UserError("--requests: the file has the prompts, targets and all that goes with them: give it alone")
    if prompt is None or target is None:
        raise UserError("what is to be changed? give --prompt and --target, or --requests FILE")
    request = ie.EditRequest(prompt, target, task, subject, slots or {})
    return ie.EditCase(request, tuple(rephrase or ()), tuple(neighbours or ()))


def _model(scale: Scale | None, lm: str | None, device: str | None, dtype: str | None, chat: bool) -> FrozenLM:
    import instructedit as ie

    known = scale.lm_options() if scale and not lm else {"name": lm or "tiny"}
    asked = {"device": device, "dtype": dtype, "chat": chat}
    return ie.FrozenLM.from_pretrained(**known | {name: value for name, value in asked.items() if value})


def _trained_for(editor: str) -> str | None:
    """Returns the LM that a trained editor was trained for, and prints its name; None for other editors."""
    from instructedit.editors import lm_of

    if name := lm_of(editor):
        print(f"lm: {name}, which this editor was trained for", file=sys.stderr)
    return name


def _method(editor: str, lm: FrozenLM, options: dict[str, Any] | None, scale: Scale | None) -> Editor:
    """Returns a trained editor, or one that needs no training with its hyper-parameters at the scale."""
    from instructedit.editors import any_editor, editor_names

    own = scale.editor_options(editor) if scale and editor in editor_names() else {}
    return any_editor(editor, lm, own | (options or {}))


def _progress(what: str, unit: str = "batch") -> Any:
    """Makes a progress bar on the terminal that appears after one second."""
    from tqdm import tqdm

    return partial(tqdm, desc=what, unit=f" {unit}", leave=False, delay=1, file=sys.stderr)


def _check_sequence(asked: EditCommand) -> None:
    """Checks before the work that the options suit a sequence, and that the folder of its tables can be written."""
    unused = _OF_REPORTS if asked.sequential else _OF_SEQUENCES
    given = [name for name in unused if getattr(asked, name) != getattr(EditCommand, name)]
    if given and asked.sequential:
        raise UserError(
            f"--sequential does not go with --{given[0]}; what a sequence leaves is --out, --save and --merge"
        )
    if given:
        raise UserError(f"--{given[0]} is an option of a sequence: add --sequential, or leave it out")
    if asked.out:
        check_writable(asked.out, "--out")


def _sequence(asked: EditCommand, lm: FrozenLM, editor: Editor, cases: list[EditCase]) -> EditSequence:
    """Makes one edit after another."""
    import instructedit as ie
    from instructedit.reports.sequences import case_records

    settings = ie.Evaluation(
        generate=False, fluency_tokens=0, description=asked.description, instruction=asked.instruction
    )
    return ie.edit_sequence(
        lm, editor, case_records(lm, cases), score_every=asked.score_every, batch_size=asked.batch_size,
        sample=asked.sample, settings=settings, text=asked.text, out=asked.out,
        progress=_progress(f"{editor.name} makes edit after edit", _edits(asked.batch_size)),
    )  # fmt: skip


def _edits(count: int) -> str:
    return f"{count} edit{'s' if count != 1 else ''}"


def _finish_sequence(asked: EditCommand, lm: FrozenLM, found: EditSequence) -> None:
    """Prints a sequence's table and writes what the options ask for.

    Raises:
        UserError: After that, if the sequence ended early.
    """
    from instructedit.analysis.curves import curves_table
    from instructedit.evaluation.drift import Drift
    from instructedit.reports.words import drift_line

    console().print(curves_table(found.curves))
    for row in found.drifts.to_dict("records"):
        print(f"after {_edits(row.pop('edits'))}, {drift_line(Drift(**row))}")
    costs = found.costs
    each = f"{costs['seconds'].median():.2f} s for {_edits(asked.batch_size)} (median)"
    print(f"{_edits(costs['edits'].iloc[-1])}; {each}, {costs['bytes'].iloc[-1] / 1e6:.1f} MB carried")
    if asked.out:
        print(f"tables and figure: {asked.out}")
    if asked.save and found.edit is not None:
        lm.save(found.edit, asked.save)
        print(f"saved to {asked.save}: one edit that does what all did")
    if asked.merge and found.edit is not None:
        lm.merge(found.edit).save_pretrained(asked.merge)
        lm.tokenizer.save_pretrained(asked.merge)
    if found.stopped:
        raise UserError(f"the sequence ended early: {found.stopped}")


def _check_targets(save: str | None, merge: str | None) -> None:
    """Checks before the work that both folders can be written, and that no model gets the edit twice."""
    adapter = check_writable(save, "--save") if save else None
    model = check_writable(merge, "--merge") if merge else None
    if adapter and adapter == model:
        raise UserError("--save and --merge name one folder: loading it would apply the edit twice")
    if model and (model / "adapter_config.json").exists():
        raise UserError(f"--merge {merge}: holds an adapter, which loading would apply to the model: another folder")
    if adapter and (adapter / "config.json").exists():
        raise UserError(f"--save {save}: holds a model, to which loading would apply the adapter: another folder")


def _places(keep: str | None, store: str | None, count: int) -> list[Path]:
    """Returns the folder in which each edit will be kept, if any is; checked before the work."""
    from instructedit.reports.store import free_place, store_folder

    if keep is None:
        return []
    folder = store_folder(store)
    check_writable(folder, "--keep")
    return [free_place(keep if count == 1 else f"{keep}-{number:03}", folder) for number in range(count)]


def _keep(
    lm: FrozenLM, report: EditReport, rank: int | Literal["auto"] | None, save: Path | None, places: list[Path]
) -> None:
    """Saves and keeps each edit, at a rank that can be served."""
    from instructedit.reports.ranks import served
    from instructedit.reports.store import keep, write_edit

    for number, each in enumerate(report.each()):
        own, small = served(lm, each, rank)
        if save:
            write_edit(lm, own, save if len(report.edits) == 1 else save / f"{number:03}")
        if places:
            keep(lm, own, places[number].name, places[number].parent)
        where = " and ".join(str(place) for place in (save, *places[number : number + 1]) if place)
        print(f"saved to {where}" + (f", {small}" if small else ""))


def _show(report: EditReport) -> None:
    from instructedit.reports.table import tables

    terminal = console()
    for part in tables(report):
        terminal.print(part)


main = EditCommand
