"""The one loop that edits, probes and scores. `test`, `evaluate` and every experiment use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from instructedit.data.batch import Front, plain
from instructedit.editors import Editor
from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.instructions import Instructor
from instructedit.lm import FrozenLM, Judged, TokenBatch
from instructedit.metrics import agreement, answer_match, exact_match, fluency, row_mean, token_accuracy
from instructedit.records import EditRecord, Probe

if TYPE_CHECKING:
    from pandas import DataFrame

Row = dict[str, Any]
#: Kinds of probes that should give their own answer after the edit.
IN_SCOPE = ("reliability", "generalization", "portability")
REPLIES = ("wanted", "opposite")


@dataclass(frozen=True)
class Evaluation:
    """How edited models are scored.

    Attributes:
        generate: Also let the model answer freely, and keep its words before and after the edit.
        fluency_tokens: Length of the text that Fluency is measured on; 0 leaves Fluency out.
        descriptions: Which of a bank's descriptions instructions are drawn from.
        description: Id of one description to use for every record instead; ``10`` is the tenth of each task's bank.
        instruction: A free sentence for every record instead; or one for each task, by its name.
        replies: Replies of each sentiment that edit success is measured on, the first ones of a record.
        seed: Of the descriptions drawn and of sampled text, which depends on it and the record alone.
        tokens: In one forward pass, padding and what is to be generated included, at most; it bounds the memory.
        kv_dtype: Keys and values of sampled text (Fluency) as they are computed (``float32``), or rounded, in half the
            memory, so that twice as many rows are sampled at once.
    """

    generate: bool = True
    fluency_tokens: int = 100
    descriptions: Literal["train", "heldout", "unseen"] = "train"
    description: str | None = None
    instruction: str | dict[str, str] | None = None
    replies: int = 2
    seed: int = 0
    tokens: int = 8192
    kv_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def text_tokens(self) -> int:
        """Of sampled text in one pass, at most."""
        return self.tokens if self.kv_dtype == "float32" else 2 * self.tokens


@dataclass(frozen=True)
class _Asked:
    """One prompt with one answer, put to the model under one edit."""

    owner: int
    probe: Probe
    number: int  # of the probe within its record
    view: str
    main: bool
    prompt: str
    answer: str


@dataclass
class Outcome:
    """What a batch of edits did.

    Attributes:
        rows: One row for each probe and view (see `evaluate`).
    """

    rows: list[Row]


#: Is shown records and their edits, which live no longer than they are scored.
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
        instructor = editor.instructor(settings.descriptions, settings.description, settings.seed, settings.instruction)
        outcome = Outcome([])
        for numbers in _alike(lm, records, instructor, settings):
            rows = _evaluated(lm, editor, [records[i] for i in numbers], instructor, settings, watchers)
            outcome.rows += [row | {"owner": numbers[row["owner"]]} for row in rows]
        asked = [row for row in outcome.rows if row["kind"] == "reliability" and "after" in row]
        _say(lm, None, asked, "before", settings.tokens)
    outcome.rows.sort(key=lambda row: row["owner"])
    for row in outcome.rows:
        del row["owner"]
    return outcome


def _alike(
    lm: FrozenLM, records: Sequence[EditRecord], instructor: Instructor | None, settings: Evaluation
) -> Iterator[list[int]]:
    """Numbers of records whose requests fit together; those with replies stand apart, as many as speak at once."""
    prompts = [_front(instructor, record)(record.request.prompt) for record in records]
    # Of a request activations are kept, for its gradient: more than a probe takes.
    room = [2 * n for n in lm.text.lengths([(p, r.request.target) for p, r in zip(prompts, records, strict=True)])]
    spoken = [bool(record.of(*REPLIES)) for record in records]
    if settings.fluency_tokens:
        share = settings.text_tokens // settings.tokens
        beside = settings.fluency_tokens + lm.row_tokens
        texts = [math.ceil((length + beside) / share) for length in _lengths(lm, prompts)]
        room = [max(r, text) if s else r for r, text, s in zip(room, texts, spoken, strict=True)]
    for kind in (True, False):
        numbers = [i for i, s in enumerate(spoken) if s == kind]
        for chunk in _chunks([(room[i],) for i in numbers], settings.tokens):
            yield sorted(numbers[i] for i in chunk)


def _front(instructor: Instructor | None, record: EditRecord) -> Front:
    return instructor.front(record.request, key=record.id) if instructor else plain


def _evaluated(
    lm: FrozenLM, editor: Editor, records: list[EditRecord], instructor: Instructor | None, settings: Evaluation,
    watchers: Sequence[Watcher],
) -> list[Row]:  # fmt: skip
    edit = _make(editor, records, instructor)
    for watcher in watchers:
        watcher(records, edit)
    asked = list(_questions(records, instructor, settings.replies))
    scores = _score(lm, edit, asked, records, settings.tokens)
    rows = _best_alias([_row(records[a.owner], a, s) for a, s in zip(asked, scores, strict=True)])
    if settings.generate:
        _answer_freely(lm, edit, rows, records, settings.tokens)
    if settings.fluency_tokens:
        rows += _fluency(lm, edit, records, instructor, settings)
    return rows


def _make(editor: Editor, records: Sequence[EditRecord], instructor: Instructor | None) -> Edit:
    training = editor.training
    editor.eval()
    try:
        return editor.make(editor.requests([r.request for r in records], instructor, [r.id for r in records])).detach()
    finally:
        editor.train(training)


def _questions(records: Sequence[EditRecord], instructor: Instructor | None, replies: int) -> Iterator[_Asked]:
    """In-scope probes behind their instruction and plain (without instructions: plain alone); locality plain."""
    for owner, record in enumerate(records):
        front = _front(instructor, record)
        views: list[tuple[str, Front]] = [("instructed", front)] if instructor else []
        views.append(("plain", plain))
        left_out = {probe for kind in REPLIES for probe in record.of(kind)[replies:]}
        for number, probe in enumerate((record.reliability, *record.probes)):
            if probe in left_out:
                continue
            if probe.kind == "locality":
                yield _Asked(owner, probe, number, "plain", True, probe.prompt, probe.answers[0])
                continue
            for view, fronted in views[:1] if probe.kind in REPLIES else views:
                for answer in probe.answers:
                    yield _Asked(owner, probe, number, view, view == views[0][0], fronted(probe.prompt), answer)


def _score(
    lm: FrozenLM, edit: Edit, asked: list[_Asked], records: Sequence[EditRecord], size: int
) -> list[dict[str, float]]:
    """Teacher-forced scores before and after the edit, in the order of `asked`."""
    start = lm.first_block(edit.sites)
    scores: list[dict[str, float]] = [{} for _ in asked]
    names = [f"record {records[a.owner].id}, {a.probe.kind} probe" for a in asked]
    every = lm.encode([(a.prompt, a.answer) for a in asked], names, scored=True)
    for chunk in _chunks([(length,) for length in every.lengths], size):
        tokens = every.select(torch.tensor(chunk))
        owner = torch.tensor([asked[i].owner for i in chunk], device=lm.device)
        before = lm.unedited_judged(tokens, start)
        worn = None if edit.changes_nothing else lm.judged(lm.states(tokens, edit, owner, start), tokens.answers)
        for i, score in zip(chunk, _compare(tokens, before, worn or before), strict=True):
            scores[i] = score
    return scores


def _compare(tokens: TokenBatch, before: Judged, after: Judged) -> Iterator[dict[str, float]]:
    rows, count, labels = tokens.rows, len(tokens), tokens.answers
    columns = {
        "accuracy": token_accuracy(after.said, labels, rows, count),
        "exact": exact_match(after.said, labels, rows, count),
        "agreement": agreement(after.said, before.said, rows, count),
        "accuracy_before": token_accuracy(before.said, labels, rows, count),
        "log_likelihood": -row_mean(after.nll, rows, count),
        "log_likelihood_before": -row_mean(before.nll, rows, count),
    }
    for row in torch.stack(list(columns.values()), -1).tolist():  # the device is waited for once
        yield dict(zip(columns, row, strict=True))


def _lengths(lm: FrozenLM, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt."""
    return [len(ids) for ids in lm.text.prompts(prompts)]


def _chunks(lengths: Sequence[tuple[int, ...]], tokens: int) -> Iterator[list[int]]:
    """Indices in groups of about one length that, padded, have at most so many tokens (or of one that has more).

    Args:
        lengths: Of the parts of each row, each of which is padded to the group's longest.
        tokens: Of a group, padding included.
    """
    group: list[int] = []
    longest: tuple[int, ...] = ()
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        wider = tuple(map(max, longest or lengths[i], lengths[i]))
        if group and (len(group) + 1) * sum(wider) > tokens:
            yield group
            group, wider = [], lengths[i]
        longest = wider
        group.append(i)
    if group:
        yield group


def _row(record: EditRecord, asked: _Asked, scores: dict[str, float]) -> Row:
    return {
        "owner": asked.owner, "task": record.task, "record": record.id, "cluster": record.cluster,
        "probe": asked.number, "kind": asked.probe.kind, "group": asked.probe.group, "view": asked.view,
        "main": asked.main, "prompt": asked.prompt, "answer": asked.answer, "aliases": asked.probe.answers, **scores,
    }  # fmt: skip


def _best_alias(rows: list[Row]) -> list[Row]:
    """One row for each probe and view: any given alias counts, so the one that fits best."""
    best: dict[tuple[int, int, str], Row] = {}
    for row in rows:
        key = (row["owner"], row["probe"], row["view"])
        if key not in best or (row["exact"], row["accuracy"]) > (best[key]["exact"], best[key]["accuracy"]):
            best[key] = row
    return list(best.values())


def _answer_freely(lm: FrozenLM, edit: Edit, rows: list[Row], records: Sequence[EditRecord], size: int) -> None:
    """Adds the model's own words and whether they are a right answer.

    Replies have no one right wording: records with replies are left to Fluency.
    """
    wanted = [r for r in rows if r["kind"] in IN_SCOPE and not records[r["owner"]].of(*REPLIES)]
    _say(lm, edit, wanted, "after", size)
    for row in wanted:
        row["generated"] = float(answer_match(row["after"], row["aliases"]))


def _say(lm: FrozenLM, edit: Edit | None, rows: list[Row], column: str, size: int) -> None:
    # Room for the longest answer and for the model to stop or to run on.
    lengths = [len(lm.words(" " + max(r["aliases"], key=len))) for r in rows]
    rooms = [min(length + 4, lm.max_length // 2) for length in lengths]
    prompts, owners = [r["prompt"] for r in rows], [r["owner"] for r in rows]

    def say(chunk: list[int]) -> list[str]:
        found: list[str] = lm.generate([prompts[i] for i in chunk], [rooms[i] for i in chunk])
        return found

    def said(these: Sequence[int]) -> list[str]:
        return _continued(lm, edit, these, owners, prompts, rooms, size, say)

    if edit is None or edit.changes_nothing:
        texts = lm.cache.recalled("words", list(zip(prompts, rooms, strict=True)), said)
    else:
        texts = said(range(len(rows)))
    for row, text in zip(rows, texts, strict=True):
        row[column] = text


def _continued(
    lm: FrozenLM, edit: Edit | None, these: Sequence[int], owners: Sequence[int], prompts: Sequence[str],
    rooms: Sequence[int], size: int, say: Callable[[list[int]], list[str]],
) -> list[str]:  # fmt: skip
    """What `say` says after these prompts under their owners' edits, in passes of at most so many tokens."""
    texts: dict[int, str] = {}
    worn = None if edit is None or edit.changes_nothing else edit
    lengths = _lengths(lm, [prompts[i] for i in these])
    sizes = [(rooms[i] + lm.row_tokens, length) for i, length in zip(these, lengths, strict=True)]
    for places in _chunks(sizes, size):
        chunk = [these[place] for place in places]
        with lm.edited(worn, None if worn is None else [owners[i] for i in chunk]):
            texts |= zip(chunk, say(chunk), strict=True)
    return [texts[i] for i in these]


def _fluency(
    lm: FrozenLM, edit: Edit, records: Sequence[EditRecord], instructor: Instructor | None, settings: Evaluation
) -> list[Row]:
    """Fluency of sampled text (top 5 tokens, as in ROME's measure) after the prompts of records with replies."""
    chosen = [i for i, record in enumerate(records) if record.of(*REPLIES)]
    prompts = [_front(instructor, records[i])(records[i].request.prompt) for i in chosen]
    tokens = min(settings.fluency_tokens, lm.max_length - max(_lengths(lm, prompts), default=0))
    seeds = [f"{settings.seed} {records[i].id}" for i in chosen]

    def say(chunk: list[int]) -> list[str]:
        return lm.sample([prompts[i] for i in chunk], tokens, [seeds[i] for i in chunk], kv_dtype=settings.kv_dtype)

    rooms = [tokens] * len(chosen)
    texts = _continued(lm, edit, range(len(chosen)), chosen, prompts, rooms, settings.text_tokens, say)
    view = "instructed" if instructor else "plain"
    rows = []
    for i, prompt, text in zip(chosen, prompts, texts, strict=True):
        record = records[i]
        probe = Probe("reliability", record.request.prompt, (record.request.target,))
        row = _row(record, _Asked(i, probe, -1, view, True, prompt, record.request.target), {})
        rows.append(row | {"kind": "fluency", "after": text, "fluency": fluency(text)})
    return rows


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found.

    Attributes:
        table: One row for each probe and view: ``task, record, cluster, kind, group, view, main, prompt, answer``,
            the scores 0..1 (``accuracy``, ``exact``, ``generated``, ``agreement``), and the model's words
            ``before`` and ``after``.
        summary: ``method, task, metric, mean, low, high, n`` with 95 % bootstrap intervals, ×100.
    """

    table: DataFrame
    summary: DataFrame

    def __str__(self) -> str:
        return self.summary.to_string(index=False, float_format="{:.2f}".format)


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
        editor: The method, bound to it.
        records: What to edit and how to probe it.
        settings: How to score.
        batch_size: Different edits in one forward pass.
        progress: Wraps the batches, e.g. ``tqdm``.
    """
    from pandas import DataFrame

    from instructedit.analysis.summary import summarise

    if not records:
        raise UserError("evaluate: no records given")
    rows: list[Row] = []
    batches = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    for batch in progress(batches):
        rows += evaluate_batch(lm, editor, batch, settings).rows
    table = DataFrame(rows)
    return Scores(table, summarise(table, editor.name))
