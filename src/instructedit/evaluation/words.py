"""Text that the model generates: free answers, and the samples that Fluency is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instructedit.edits import Edit
from instructedit.evaluation.passes import edit_numbers, passes
from instructedit.evaluation.questions import Question
from instructedit.evaluation.scoring import Row, row_of
from instructedit.evaluation.settings import Evaluation
from instructedit.instructions import RenderedRecord
from instructedit.lm import FrozenLM
from instructedit.metrics import answer_match, fluency
from instructedit.records import IN_SCOPE, REPLIES, Probe


def answer_freely(lm: FrozenLM, edit: Edit, rows: list[Row], rendered: Sequence[RenderedRecord], size: int) -> None:
    """Adds the edited model's free answers to rows of in-scope probes, and whether they are right.

    Replies have no single right wording, so records with replies are left to Fluency.
    """
    wanted = [r for r in rows if r["kind"] in IN_SCOPE and not rendered[r["request_index"]].record.of(*REPLIES)]
    write_words(lm, edit, wanted, "after", size)
    for row in wanted:
        row["generated"] = float(answer_match(row["after"], row["aliases"]))


def write_words(lm: FrozenLM, edit: Edit | None, rows: list[Row], column: str, size: int) -> None:
    """Stores what the model generates after each row's prompt, under its request's edit, in a column of the row."""
    # Enough tokens for the longest answer, and a few more to show whether the model stops or runs on.
    lengths = [len(lm.token_ids(" " + max(r["aliases"], key=len))) for r in rows]
    max_new_tokens = [min(length + 4, lm.max_length // 2) for length in lengths]
    prompts, request_indices = [r["prompt"] for r in rows], [r["request_index"] for r in rows]

    def generate(chunk: list[int], applied: Edit | None, rows: list[int] | None) -> list[str]:
        found: list[str] = lm.generate([prompts[i] for i in chunk], [max_new_tokens[i] for i in chunk], applied, rows)
        return found

    def generated(these: Sequence[int]) -> list[str]:
        return _continued(lm, edit, these, request_indices, prompts, max_new_tokens, size, generate)

    if edit is None or edit.is_identity:
        texts = lm.cache.memoized("words", list(zip(prompts, max_new_tokens, strict=True)), generated)
    else:
        texts = generated(range(len(rows)))
    for row, text in zip(rows, texts, strict=True):
        row[column] = text


def _continued(
    lm: FrozenLM, edit: Edit | None, these: Sequence[int], request_indices: Sequence[int], prompts: Sequence[str],
    max_new_tokens: Sequence[int], size: int, generate: Callable[[list[int], Edit | None, list[int] | None], list[str]],
    trees: bool = True,
) -> list[str]:  # fmt: skip
    """Generates text after the chosen prompts, each under its request's edit, in passes of bounded size.

    Args:
        lm: The model.
        edit: An edit for each request index, or one for all.
        these: Indices of the chosen prompts.
        request_indices: Request index of every prompt.
        prompts: All prompts.
        max_new_tokens: Number of new tokens for every prompt.
        size: Largest number of tokens in a pass, new ones included.
        generate: Takes the prompt indices of a pass, the edits to apply, and which of them each prompt has.
        trees: Whether `generate` reads a prefix shared by one request's prompts only once, where the model can.
    """
    texts: dict[int, str] = {}
    applied = None if edit is None or edit.is_identity else edit
    ids = lm.text.prompts([prompts[i] for i in these])
    beside = [max_new_tokens[i] + lm.generation.row_tokens for i in these]
    request_indices = edit_numbers(applied, request_indices)
    groups = [0 if applied is None else request_indices[i] for i in these]
    for places in passes(ids, groups, size, beside, trees and lm.generation.shares_prompts(applied)):
        chunk = [these[place] for place in places]
        found = generate(chunk, applied, None if applied is None else [request_indices[i] for i in chunk])
        texts |= zip(chunk, found, strict=True)
    return [texts[i] for i in these]


def fluency_rows(lm: FrozenLM, edit: Edit, rendered: Sequence[RenderedRecord], settings: Evaluation) -> list[Row]:
    """Measures Fluency on text sampled (top 5 tokens, as in ROME) after the prompts of records with replies."""
    chosen = [i for i, one in enumerate(rendered) if one.record.of(*REPLIES)]
    prompts = [rendered[i].ask(rendered[i].record.reliability) for i in chosen]
    tokens = min(settings.fluency_tokens, lm.max_length // 2)  # a prompt that leaves less room is shortened
    seeds = [f"{settings.seed} {rendered[i].record.id}" for i in chosen]

    def generate(chunk: list[int], applied: Edit | None, rows: list[int] | None) -> list[str]:
        with lm.edited(applied, rows):
            asked, own = [prompts[i] for i in chunk], [seeds[i] for i in chunk]
            return lm.sample(asked, tokens, own, kv_dtype=settings.kv_dtype)

    max_new_tokens, size = [tokens] * len(chosen), settings.text_tokens
    texts = _continued(lm, edit, range(len(chosen)), chosen, prompts, max_new_tokens, size, generate, trees=False)
    rows = []
    for i, prompt, text in zip(chosen, prompts, texts, strict=True):
        record = rendered[i].record
        probe = Probe("reliability", record.request.prompt, (record.request.target,))
        view = "instructed" if rendered[i].prefix else "plain"
        row = row_of(Question(i, record, probe, -1, view, True, prompt, record.request.target), {})
        rows.append(row | {"kind": "fluency", "after": text, "fluency": fluency(text)})
    return rows
