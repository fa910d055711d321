"""Sequential editing: many edits on one model, each scored right after it is made, and again later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from instructedit.analysis.curves import curves_figure, sequence_curves
from instructedit.drawing import save_figure
from instructedit.editors import Editor
from instructedit.editors.report import check_finite
from instructedit.edits import Edit, PromptEdit, add
from instructedit.errors import UserError
from instructedit.evaluation.drift import drifts, text_sample
from instructedit.evaluation.runner import ask_all, check_records
from instructedit.evaluation.scoring import Row
from instructedit.evaluation.settings import Evaluation
from instructedit.instructions import RenderedRecord, render_records
from instructedit.lm import FrozenLM
from instructedit.records import EditRecord

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class EditSequence:
    """The result of a sequence of edits.

    Attributes:
        edit: One edit that combines all of them; None if none was made.
        table: Probe rows as in `Scores.table`, with ``position`` (index of the record in the sequence, from 0),
            ``edits`` (how many records the model had been edited with when it was asked) and ``again`` (False right
            after the record's own edit). ``agreement`` always compares with the unedited model.
        curves: ``edits, group, method, task, metric, mean, low, high, n`` (see `sequence_curves`), ×100.
        costs: The cost of each step: ``edits`` so far, ``seconds`` to compute its edit and add it to the earlier ones,
            and ``bytes`` of the combined edit.
        drifts: Change of the predictions on unrelated text at each checkpoint: ``edits`` and the fields of `Drift`.
        about: Editor, options, model and settings, as plain values.
        stopped: Why the sequence ended before the last record; empty if it did not.
    """

    edit: Edit | None
    table: DataFrame
    curves: DataFrame
    costs: DataFrame
    drifts: DataFrame
    about: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""

    def save(self, folder: str | Path) -> Path:
        """Writes the tables as ``{curves,probes,costs,drifts}.csv``, ``curves.{png,svg}`` and ``sequence.json``.

        Args:
            folder: The folder; created if it does not exist.

        Returns:
            The folder.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        tables = {"curves": self.curves, "probes": self.table, "costs": self.costs, "drifts": self.drifts}
        for name, frame in tables.items():
            frame.to_csv(folder / f"{name}.csv", index=False)
        facts = self.about | {"stopped": self.stopped, "curves": json.loads(self.curves.to_json(orient="records"))}
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        (folder / "sequence.json").write_text(text + "\n", encoding="utf-8")
        if len(self.curves):
            title = f"{self.about.get('editor', '')} on {self.about.get('lm', '')}, edit after edit"
            save_figure(curves_figure(self.curves, title), folder / "curves")
        return folder


def edit_sequence(
    lm: FrozenLM,
    editor: Editor,
    records: Sequence[EditRecord],
    *,
    score_every: int = 100,
    batch_size: int = 1,
    sample: int | None = None,
    settings: Evaluation | None = None,
    text: str | None = "tiny",
    out: str | Path | None = None,
    progress: Callable[[Any], Any] = iter,
) -> EditSequence:
    """Edits a model with one record after another, each on top of the earlier ones, and scores it on the way.

    Gradients are taken, and optimisation runs, on the model that carries the earlier edits. Each record is scored right
    after its own edit, and again, together with the earlier ones, after every `score_every` edits and at the end. An
    editor that keeps a state over a sequence implements `Editor.begin_sequence` and `Editor.make_next`.

    Args:
        lm: The model; it is left unchanged.
        editor: The editing method, bound to the model.
        records: What to edit, in this order, and how to probe it.
        score_every: Number of edits between two checkpoints.
        batch_size: Number of records that one edit serves (a joint edit, as by ``editor.edit(…, together=True)``).
        sample: Largest number of records to score again at the checkpoints: always the same ones, evenly spread over
            the sequence; None means all of them.
        settings: How to score; by default with teacher-forced scores only, without free answers and Fluency.
        text: Unrelated plain text on which predictions are compared at the checkpoints (see `text_sample`); None
            compares none.
        out: Folder for the tables and the figure (see `EditSequence.save`). They are written at every checkpoint, so
            that those so far are left of a sequence that is killed; None writes none.
        progress: Wraps the steps, e.g. ``tqdm``.

    Returns:
        Tables, curves, and the combined edit. If an edit cannot be made, or the edited model's logits are NaN, the
        sequence ends there and `EditSequence.stopped` says why; at the first edit this raises an error instead.

    Raises:
        UserError: If there are no records, two of one task share an id, a number is below 1, or a record does not suit
            the editor.
    """
    _check(records, {"score_every": score_every, "batch_size": batch_size, "sample": 1 if sample is None else sample})
    settings = settings or Evaluation(generate=False, fluency_tokens=0)
    training = editor.training
    editor.eval()
    try:
        # Editing needs gradients, whatever mode the caller is in.
        with torch.inference_mode(False), torch.no_grad():
            run = _Run(lm, editor, records, settings, sample, text)
            about = {
                "editor": editor.name, "options": editor.options(), "lm": lm.name, "records": len(records),
                "score_every": score_every, "batch_size": batch_size, "sample": sample, "text": text,
                "settings": asdict(settings),
            }  # fmt: skip
            for start in progress(range(0, len(records), batch_size)):
                stop = min(start + batch_size, len(records))
                if not run.step(start, stop, score_every):
                    break
                if out is not None and run.scored == stop < len(records):
                    run.result(about).save(out)
    finally:
        editor.train(training)
    result = run.result(about)
    if out is not None:
        result.save(out)
    return result


class _Run:
    """The state of a sequence while it runs.

    Attributes:
        carried: One edit that combines all edits so far.
        rows: Probe rows so far.
        costs: Costs of the steps so far.
        drifts: Drifts at the checkpoints so far.
        stopped: Why the sequence ended early; empty otherwise.
    """

    def __init__(
        self, lm: FrozenLM, editor: Editor, records: Sequence[EditRecord], settings: Evaluation, sample: int | None,
        text: str | None,
    ) -> None:  # fmt: skip
        self.lm, self.editor, self.settings = lm, editor, settings
        instructor = settings.instructor(editor)
        self.rendered = render_records(records, instructor)
        editor.rendered_requests(self.rendered)  # unsuitable records raise an error before the work begins
        self.again = _spread(len(records), sample)
        self.state = editor.begin_sequence()
        self.carried: Edit | None = None
        self.rows: list[Row] = []
        self.costs: list[dict[str, float]] = []
        self.text = text_sample(lm, text) if text else None
        self.drifts: list[dict[str, float]] = []
        self.scored = 0  # edits at the last checkpoint
        self.stopped = ""

    def step(self, start: int, stop: int, score_every: int) -> bool:
        """Edits with the records from `start` to `stop` and scores them; returns False if that failed."""
        before, costs, rows = self.carried, len(self.costs), len(self.rows)
        try:
            self._edit(start, stop)
            self._ask(range(start, stop), stop, again=False)
            if stop // score_every > start // score_every or stop == len(self.rendered):
                self._checkpoint(stop)
        except UserError as error:
            if before is None:
                raise
            self.carried = before
            del self.costs[costs:], self.rows[rows:]  # what the failed edit left
            self.stopped = f"edit {stop} (record {self.rendered[start].record.id}): {error}"
            with suppress(UserError):  # the earlier model may have no finite scores either
                self._checkpoint(start)
        return not self.stopped

    def result(self, about: dict[str, Any]) -> EditSequence:
        """Returns the tables and the combined edit so far."""
        from pandas import DataFrame

        table = DataFrame(self.rows)
        curves = sequence_curves(table, self.editor.name)
        costs, drifted = DataFrame(self.costs), DataFrame(self.drifts)
        return EditSequence(self.carried, table, curves, costs, drifted, about, self.stopped)

    def _checkpoint(self, edits: int) -> None:
        """Scores records again and reads the text, unless that was already done at this number of edits."""
        if edits != self.scored:
            self._ask(self.again, edits, again=True)
            if self.text is not None and self.carried is not None:
                (drift,) = drifts(self.lm, self.text, self.carried)
                self.drifts.append({"edits": edits} | asdict(drift))
            self.scored = edits

    def _edit(self, start: int, stop: int) -> None:
        began = time.perf_counter()
        batch = self.editor.rendered_requests(self.rendered[start:stop])
        with carrying(self.lm, self.carried):
            edit, self.state = self.editor.make_next(batch, self.state)
        check_finite(edit, self.editor.name)
        self.carried = add(self.carried, edit.detach())
        seconds = time.perf_counter() - began
        self.costs.append({"edits": stop, "seconds": seconds, "bytes": self.carried.nbytes})

    def _ask(self, numbers: Sequence[int], edits: int, again: bool) -> None:
        assert self.carried is not None
        chosen = [number for number in numbers if number < edits]
        asked: list[RenderedRecord] = [self.rendered[number] for number in chosen]
        for row in ask_all(self.lm, self.carried, asked, self.settings):
            self.rows.append(row | {"position": chosen[row.pop("request_index")], "edits": edits, "again": again})


def carrying(lm: FrozenLM, carried: Edit | None) -> AbstractContextManager[Any]:
    """Applies the edits so far to the model within the context, so that the next edit is made on top of them.

    Edits that depend on the prompt change no layer permanently: the next one is made on the unedited model.
    """
    return nullcontext() if carried is None or isinstance(carried, PromptEdit) else lm.edited(carried)


def _spread(count: int, sample: int | None) -> list[int]:
    """Returns at most `sample` indices of `count` records, evenly spread and including the first."""
    few = count if sample is None else min(sample, count)
    return sorted({i * count // few for i in range(few)})


def _check(records: Sequence[EditRecord], numbers: dict[str, int]) -> None:
    check_records(records, "edit_sequence")
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"edit_sequence: {name} must be at least 1, got {number}")
