"""Teacher-forced scores: what a model predicts at the tokens of given answers, before and after an edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from instructedit.edits import Edit
from instructedit.evaluation.passes import edit_numbers, passes
from instructedit.evaluation.questions import Question
from instructedit.lm import FrozenLM, TokenBatch, TokenScores
from instructedit.metrics import agreement, exact_match, row_mean, token_accuracy

Row = dict[str, Any]


def scored(lm: FrozenLM, edit: Edit, asked: list[Question], size: int) -> list[Row]:
    """Scores each probe and prompt style before and after the edit, one row for each.

    Any given alias counts: a row holds the one that fits best after the edit, and only that one is scored before it.

    Args:
        lm: The model.
        edit: An edit for each request, or one for all.
        asked: The questions.
        size: Largest number of tokens in a forward pass.
    """
    start = lm.first_block(edit.sites)
    names = [f"record {question.record.id}, {question.probe.kind} probe" for question in asked]
    tokens = lm.encode([(question.prompt, question.answer) for question in asked], names, scored=True)
    request_indices = [question.request_index for question in asked]
    after = None if edit.is_identity else _predicted(lm, tokens, edit, request_indices, start, size)
    every = after or _predicted(lm, tokens, None, request_indices, start, size)
    best = _best_aliases(asked, _fit(tokens, every))
    kept = tokens.select(torch.tensor(best))
    own = _of_rows(every, tokens, best)
    before = own if after is None else _predicted(lm, kept, None, [request_indices[i] for i in best], start, size)
    return [row_of(asked[i], scores) for i, scores in zip(best, _compare(kept, before, own), strict=True)]


def row_of(question: Question, scores: dict[str, float]) -> Row:
    """Returns a question and its scores as a row of the probe table."""
    record, probe = question.record, question.probe
    return {
        "request_index": question.request_index, "task": record.task, "record": record.id, "cluster": record.cluster,
        "probe": question.number, "kind": probe.kind, "group": probe.group, "view": question.view,
        "main": question.main, "prompt": question.prompt, "answer": question.answer, "aliases": probe.answers, **scores,
    }  # fmt: skip


def _predicted(
    lm: FrozenLM, tokens: TokenBatch, edit: Edit | None, request_indices: list[int], start: int, size: int
) -> TokenScores:
    """Scores the tokens of all answers, each row under its request's edit, in passes of at most `size` tokens."""
    request_indices = edit_numbers(edit, request_indices)
    parts = passes(tokens.unpadded(), request_indices, size, trees=lm.prefixes.takes_trees)
    groups = [torch.tensor(sorted(part)) for part in parts]
    found = []
    for group in groups:
        part = tokens.select(group)
        if edit is None:
            found.append(lm.scores.unedited_predictions(part, start))
        else:
            rows = torch.tensor([request_indices[i] for i in group.tolist()], device=lm.device)
            found.append(lm.scores.predictions(part, edit, rows))
    order = tokens.in_order(groups)
    return TokenScores(*(torch.cat(column)[order] for column in zip(*found, strict=True)))


def _of_rows(scores: TokenScores, tokens: TokenBatch, rows: list[int]) -> TokenScores:
    """Selects the scores of the given rows, in the given order."""
    sizes = tokens.answer_sizes()
    columns = [column.split(sizes) for column in scores]
    return TokenScores(*(torch.cat([column[i] for i in rows]) for column in columns))


def _best_aliases(asked: Sequence[Question], scores: list[tuple[float, ...]]) -> list[int]:
    """Returns for each probe and prompt style the index of the best-fitting answer; ties go to the first."""
    best: dict[tuple[int, int, str], int] = {}
    for i, question in enumerate(asked):
        key = (question.request_index, question.number, question.view)
        if key not in best or scores[i] > scores[best[key]]:
            best[key] = i
    return list(best.values())


def _fit(tokens: TokenBatch, token_scores: TokenScores) -> list[tuple[float, ...]]:
    """Returns how well each row's answer fits: whether all of its tokens are predicted, then the share that is."""
    scores = (exact_match, token_accuracy)
    columns = [score(token_scores.predicted, tokens.answers, tokens.rows, len(tokens)) for score in scores]
    return [tuple(row) for row in torch.stack(columns, -1).tolist()]


def _compare(tokens: TokenBatch, before: TokenScores, after: TokenScores) -> Iterator[dict[str, float]]:
    rows, count, labels = tokens.rows, len(tokens), tokens.answers
    columns = {
        "accuracy": token_accuracy(after.predicted, labels, rows, count),
        "exact": exact_match(after.predicted, labels, rows, count),
        "agreement": agreement(after.predicted, before.predicted, rows, count),
        "accuracy_before": token_accuracy(before.predicted, labels, rows, count),
        "log_likelihood": -row_mean(after.nll, rows, count),
        "log_likelihood_before": -row_mean(before.nll, rows, count),
    }
    for row in torch.stack(list(columns.values()), -1).tolist():  # one synchronisation with the device
        yield dict(zip(columns, row, strict=True))
