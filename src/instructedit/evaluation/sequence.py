"""Many edits one after another on one model, which carries those before: scored right after each, and again."""

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
from instructedit.evaluation.runner import ask_all
from instructedit.evaluation.scoring import Row
from instructedit.evaluation.settings import Evaluation
from instructedit.instructions import RenderedRecord, render_records
from instructedit.lm import FrozenLM
from instructedit.records import EditRecord

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class EditSequence:
    """What became of a sequence of edits.

    Attributes:
        edit: One edit that does what all did; None if none was made.
        table: Probe rows as those of `evaluate`, with ``position`` (number of the record in the sequence, from 0),
            ``edits`` (how many records the model was edited with when it was asked) and ``again`` (False right after
            the record's own edit). ``agreement`` compares with the unedited model, whatever was edited before.
        curves: ``edits, group, method, task, metric, mean, low, high, n`` (see `sequence_curves`), ×100.
        costs: What each step took: ``edits``, ``seconds`` to make its edit and put it on top of those before, and
            ``bytes`` of what the model carries then.
        about: Editor, options, model and settings, as plain values.
        stopped: Why it ended before the last record; empty if it did not.
    """

    edit: Edit | None
    table: DataFrame
    curves: DataFrame
    costs: DataFrame
    about: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""

    def save(self, folder: str | Path) -> Path:
        """Writes ``curves.csv``, ``curves.png``, ``curves.svg``, ``probes.csv``, ``costs.csv`` and ``sequence.json``.

        Args:
            folder: Made if need be.

        Returns:
            The folder.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in (("curves", self.curves), ("probes", self.table), ("costs", self.costs)):
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
    progress: Callable[[Any], Any] = iter,
) -> EditSequence:
    """Edits a model with one record after another, each on top of those before, and scores it on the way.

    Gradients are taken, and optimisation runs, on the model that carries the earlier edits. Each record is scored right
    after its own edit, and again with those before it after every `score_every` edits and at the end. An editor that
    keeps a state over a sequence says so in `Editor.begin_sequence` and `Editor.make_next`.

    Args:
        lm: The model; left as it is.
        editor: The method, bound to it.
        records: What to edit, in this order, and how to probe it.
        score_every: Edits between two checkpoints.
        batch_size: Records that one edit serves (made together, as ``editor.edit(…, together=True)`` makes them).
        sample: How many records are scored again at the checkpoints, at most: evenly spread over the sequence, always
            the same; None is all of them.
        settings: How to score; by default teacher-forced scores alone, without free answers and Fluency.
        progress: Wraps the steps, e.g. ``tqdm``.

    Returns:
        Tables, curves, and the edit. If an edit cannot be made or leaves a model whose logits are no numbers, the
        sequence ends there, and `EditSequence.stopped` says why; at the first edit that is an error.

    Raises:
        UserError: If there are no records, two have one id, a number is below 1, or a record does not suit the editor.
    """
    from pandas import DataFrame

    _check(records, {"score_every": score_every, "batch_size": batch_size, "sample": 1 if sample is None else sample})
    settings = settings or Evaluation(generate=False, fluency_tokens=0)
    training = editor.training
    editor.eval()
    try:
        # Editing needs gradients, whatever mode the caller is in.
        with torch.inference_mode(False), torch.no_grad():
            run = _Run(lm, editor, records, settings, sample)
            for start in progress(range(0, len(records), batch_size)):
                if not run.step(start, min(start + batch_size, len(records)), score_every):
                    break
    finally:
        editor.train(training)
    table = DataFrame(run.rows)
    about = {
        "editor": editor.name, "options": editor.options(), "lm": lm.name, "records": len(records),
        "score_every": score_every, "batch_size": batch_size, "sample": sample, "settings": asdict(settings),
    }  # fmt: skip
    curves = sequence_curves(table, editor.name)
    return EditSequence(run.carried, table, curves, DataFrame(run.costs), about, run.stopped)


class _Run:
    """A sequence under way.

    Attributes:
        carried: One edit that does what all did so far.
        rows: Of the probes.
        costs: Of the steps.
        stopped: Why it ended early.
    """

    def __init__(
        self, lm: FrozenLM, editor: Editor, records: Sequence[EditRecord], settings: Evaluation, sample: int | None
    ) -> None:
        self.lm, self.editor, self.settings = lm, editor, settings
        instructor = settings.instructor(editor)
        self.rendered = render_records(records, instructor)
        editor.rendered_requests(self.rendered)  # what does not fit is found out before the work
        self.again = _spread(len(records), sample)
        self.state = editor.begin_sequence()
        self.carried: Edit | None = None
        self.rows: list[Row] = []
        self.costs: list[dict[str, float]] = []
        self.scored = 0  # edits at the last checkpoint
        self.stopped = ""

    def step(self, start: int, stop: int, score_every: int) -> bool:
        """Edits with the records from `start` to `stop` and scores; False if that failed."""
        before = self.carried
        try:
            self._edit(start, stop)
            self._ask(range(start, stop), stop, again=False)
            if stop // score_every > start // score_every or stop == len(self.rendered):
                self._checkpoint(stop)
        except UserError as error:
            if before is None:
                raise
            self.carried = before
            self.stopped = f"edit {stop} (record {self.rendered[start].record.id}): {error}"
            with suppress(UserError):  # as far as the model before still has scores
                self._checkpoint(start)
        return not self.stopped

    def _checkpoint(self, edits: int) -> None:
        """Scores records again, if that was not done at so many edits."""
        if edits != self.scored:
            self._ask(self.again, edits, again=True)
            self.scored = edits

    def _edit(self, start: int, stop: int) -> None:
        began = time.perf_counter()
        batch = self.editor.rendered_requests(self.rendered[start:stop])
        with carrying(self.lm, self.carried):
            edit, self.state = self.editor.make_next(batch, self.state)
        check_finite(edit, self.editor.name)
        self.carried = add(self.carried, edit.detach())
        held = sum(tensor.nbytes for tensor in self.carried.state().values())
        self.costs.append({"edits": stop, "seconds": time.perf_counter() - began, "bytes": held})

    def _ask(self, numbers: Sequence[int], edits: int, again: bool) -> None:
        assert self.carried is not None
        chosen = [number for number in numbers if number < edits]
        asked: list[RenderedRecord] = [self.rendered[number] for number in chosen]
        for row in ask_all(self.lm, self.carried, asked, self.settings):
            self.rows.append(row | {"position": chosen[row.pop("request_index")], "edits": edits, "again": again})


def carrying(lm: FrozenLM, carried: Edit | None) -> AbstractContextManager[Any]:
    """Inside, the model has the edits on that the next one is made on top of.

    What depends on the prompt changes no layer for good: the next edit is made on the unedited model.
    """
    return nullcontext() if carried is None or isinstance(carried, PromptEdit) else lm.edited(carried)


def _spread(count: int, sample: int | None) -> list[int]:
    """Numbers of so many of `count` records, evenly spread, the first one among them."""
    few = count if sample is None else min(sample, count)
    return sorted({i * count // few for i in range(few)})


def _check(records: Sequence[EditRecord], numbers: dict[str, int]) -> None:
    if not records:
        raise UserError("edit_sequence: no records given")
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"edit_sequence: {name} must be at least 1, got {number}")
    seen: set[tuple[str, str]] = set()
    for record in records:
        if (key := (record.task, record.id)) in seen:
            raise UserError(f"edit_sequence: two records of task {record.task!r} have the id {record.id!r}")
        seen.add(key)
