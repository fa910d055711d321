"""Edits records and scores the edited models, for one batch or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from instructedit.editors import Editor
from instructedit.edits import Edit
from instructedit.errors import UserError, at_least
from instructedit.evaluation.passes import chunks
from instructedit.evaluation.questions import questions
from instructedit.evaluation.scoring import Row, scored
from instructedit.evaluation.settings import Evaluation
from instructedit.evaluation.words import answer_freely, fluency_rows, write_words
from instructedit.instructions import RenderedRecord, render_records
from instructedit.lm import FrozenLM
from instructedit.records import REPLIES, EditRecord

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Outcome:
    """The scores of one batch of edits.

    Attributes:
        rows: One row for each probe and prompt style (see `Scores.table`).
    """

    rows: list[Row]


#: A callback that receives records and their edits; the edits are discarded once they are scored.
Watcher = Callable[[list[EditRecord], Edit], Any]


def evaluate_batch(
    lm: FrozenLM,
    editor: Editor,
    records: Sequence[EditRecord],
    settings: Evaluation | None = None,
    watchers: Sequence[Watcher] = (),
) -> Outcome:
    """Edits each record on its own, many at once, and scores every probe under its record's edit."""
    settings = settings or Evaluation()
    # Editing needs gradients, whatever mode the caller evaluates in.
    with torch.inference_mode(False), torch.no_grad():
        instructor = settings.instructor(editor)
        rendered = render_records(records, instructor)
        outcome = Outcome([])
        for numbers in _alike(lm, rendered, settings):
            chosen = [rendered[i] for i in numbers]
            rows = _evaluated(lm, editor, chosen, settings, watchers)
            outcome.rows += [row | {"request_index": numbers[row["request_index"]]} for row in rows]
        asked = [row for row in outcome.rows if row["kind"] == "reliability" and "after" in row]
        write_words(lm, None, asked, "before", settings.tokens)
    outcome.rows.sort(key=lambda row: row["request_index"])
    for row in outcome.rows:
        del row["request_index"]
    return outcome


def _alike(lm: FrozenLM, rendered: Sequence[RenderedRecord], settings: Evaluation) -> Iterator[list[int]]:
    """Groups record indices within the token budget; records with replies are grouped on their own."""
    # The activations of a request are kept for its gradient, so that it takes more memory than a probe.
    costs = [2 * n for n in lm.text.lengths([(one.prompt, one.record.request.target) for one in rendered])]
    has_replies = [bool(one.record.of(*REPLIES)) for one in rendered]
    if settings.fluency_tokens:
        share = settings.text_tokens // settings.tokens
        beside = settings.fluency_tokens + lm.generation.row_tokens
        texts = [
            math.ceil((len(ids) + beside) / share)
            for ids in lm.text.prompts([one.ask(one.record.reliability) for one in rendered])
        ]
        costs = [max(cost, text) if s else cost for cost, text, s in zip(costs, texts, has_replies, strict=True)]
    for kind in (True, False):
        numbers = [i for i, s in enumerate(has_replies) if s == kind]
        for chunk in chunks([(costs[i],) for i in numbers], settings.tokens):
            yield sorted(numbers[i] for i in chunk)


def _evaluated(
    lm: FrozenLM, editor: Editor, rendered: list[RenderedRecord], settings: Evaluation,
    watchers: Sequence[Watcher],
) -> list[Row]:  # fmt: skip
    edit = _edit(editor, rendered)
    for watcher in watchers:
        watcher([one.record for one in rendered], edit)
    return ask(lm, edit, rendered, settings)


def ask(lm: FrozenLM, edit: Edit, rendered: list[RenderedRecord], settings: Evaluation) -> list[Row]:
    """Scores every probe of the records under their edits: one edit for each record, or one that serves them all."""
    rows = scored(lm, edit, list(questions(rendered, settings.replies)), settings.tokens)
    if settings.generate:
        answer_freely(lm, edit, rows, rendered, settings.tokens)
    if settings.fluency_tokens:
        rows += fluency_rows(lm, edit, rendered, settings)
    return rows


def ask_all(lm: FrozenLM, edit: Edit, rendered: Sequence[RenderedRecord], settings: Evaluation) -> list[Row]:
    """Scores every probe of any number of records under one edit and returns the rows in the order of the records."""
    rows: list[Row] = []
    for numbers in _alike(lm, rendered, settings):
        found = ask(lm, edit, [rendered[i] for i in numbers], settings)
        rows += [row | {"request_index": numbers[row["request_index"]]} for row in found]
    return sorted(rows, key=lambda row: row["request_index"])


def _edit(editor: Editor, rendered: Sequence[RenderedRecord]) -> Edit:
    training = editor.training
    editor.eval()
    try:
        return editor.compute_edit(editor.rendered_requests(rendered)).detach()
    finally:
        editor.train(training)


@dataclass(frozen=True)
class Scores:
    """The scores that `evaluate` returns.

    Attributes:
        table: One row for each probe and prompt style: ``task, record, cluster, kind, group, view, main, prompt,
            answer``, the scores in 0..1 (``accuracy``, ``exact``, ``generated``, ``agreement``), and the model's free
            answers ``before`` and ``after`` the edit.
        summary: ``method, task, metric, mean, low, high, n`` with 95 % bootstrap intervals, ×100.
    """

    table: DataFrame
    summary: DataFrame

    def __str__(self) -> str:
        return self.summary.to_string(index=False, float_format="{:.2f}".format)


def check_records(records: Sequence[EditRecord], caller: str) -> None:
    """Raises an error for records whose scores could not be distinguished.

    Raises:
        UserError: If there are none, or two of one task share an id, by which their scores are kept.
    """
    if not records:
        raise UserError(f"{caller}: no records given")
    seen: set[tuple[str, str]] = set()
    for record in records:
        if (key := (record.task, record.id)) in seen:
            raise UserError(f"{caller}: two records of task {record.task!r} have the id {record.id!r}")
        seen.add(key)


def evaluate(
    lm: FrozenLM,
    editor: Editor,
    records: Sequence[EditRecord],
    settings: Evaluation | None = None,
    batch_size: int = 32,
    progress: Callable[[Any], Any] = iter,
) -> Scores:
    """Edits every record on its own and scores the edited models with the paper's metrics.

    Args:
        lm: The model.
        editor: The editing method, bound to the model.
        records: What to edit and how to probe it.
        settings: How to score.
        batch_size: Number of records that are edited and scored together.
        progress: Wraps the batches, e.g. ``tqdm``.

    Raises:
        UserError: If there are no records, two of one task share an id, a number is below 1, or a record does not suit
            the editor.
    """
    from pandas import DataFrame

    from instructedit.analysis.summary import summarise

    check_records(records, "evaluate")
    at_least(1, batch_size=batch_size)
    rows: list[Row] = []
    batches = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    for batch in progress(batches):
        rows += evaluate_batch(lm, editor, batch, settings).rows
    table = DataFrame(rows)
    return Scores(table, summarise(table, editor.name))
