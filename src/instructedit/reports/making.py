"""Implementation of `edit`: makes edits and reports what each did."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from instructedit.editors import Editor, any_editor
from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.evaluation.drift import drifts, text_sample
from instructedit.instructions import Instructor
from instructedit.lm import FrozenLM
from instructedit.records import EditRecord, EditRequest
from instructedit.reports.cases import EditCase, prompts_of
from instructedit.reports.measure import Reply, replies, weights_fingerprint
from instructedit.reports.neighbours import draw_neighbours, draw_paraphrases
from instructedit.reports.report import Answer, EditReport, RequestReport, Role

#: Number of requests that are edited and asked at once.
_AT_ONCE = 4


class Judge:
    """Asks a model the prompts of a report, without and with the edits.

    Args:
        lm: The model.
        ask: Further prompts to ask for every edit.
        neighbours: Number of neighbours to draw for a case that has none.
        text: The text that drift is measured on.
        max_new_tokens: Largest number of tokens in a reply.
        instructor: Source of instructions if the editor reads them: requests are then also asked with theirs in front.
    """

    def __init__(
        self, lm: FrozenLM, ask: str | Sequence[str] = (), neighbours: int = 10, text: str = "tiny",
        max_new_tokens: int = 12, instructor: Instructor | None = None,
    ) -> None:  # fmt: skip
        self.lm, self.ask, self.neighbours, self.instructor = lm, prompts_of(ask), neighbours, instructor
        self.max_new_tokens = max_new_tokens
        self.sample = text_sample(lm, text)

    def __call__(self, cases: Sequence[EditCase], edit: Edit) -> list[RequestReport]:
        """Asks all cases at once under their edits: one for each case, or one that serves them all."""
        moved = drifts(self.lm, self.sample, edit)
        prompts = [list(self._prompts(case)) for case in cases]
        asked = [(p, case.request.target) for case, own in zip(cases, prompts, strict=True) for _, p, _ in own]
        rows = [i % len(edit) for i, own in enumerate(prompts) for _ in own]
        start = self.lm.first_block(edit.sites)  # both models share the states below it
        both = [replies(self.lm, asked, each, rows, start, self.max_new_tokens) for each in (None, edit)]
        pairs = zip(*both, strict=True)
        reports = []
        for i, (case, own) in enumerate(zip(cases, prompts, strict=True)):
            answers = [
                Answer(role, prompt, group, old, new, self._differ(old, new))
                for (role, prompt, group), (old, new) in zip(own, islice(pairs, len(own)), strict=True)
            ]
            reports.append(RequestReport(case.request, tuple(answers), moved[i % len(edit)]))
        return reports

    def _prompts(self, case: EditCase) -> Iterable[tuple[Role, str, str]]:
        """Yields the role, prompt and group of every prompt to ask for a case."""
        prompt = case.request.prompt
        yield "request", prompt, ""
        if self.instructor and (instruction := self.instructor.prefix(case.request)):
            yield "instructed", instruction + prompt, ""
        yield from (("paraphrase", each, "given") for each in case.paraphrases)
        if not case.paraphrases:
            yield from (("paraphrase", each, "drawn") for each in draw_paraphrases(case.request))
        yield from (("neighbour", each, "given") for each in case.neighbours)
        if not case.neighbours:
            yield from (("neighbour", *each) for each in draw_neighbours(case.request, self.neighbours))
        yield from (("ask", each, "") for each in (*case.ask, *self.ask))

    def _differ(self, before: Reply, after: Reply) -> bool:
        """True if the first tokens of two replies differ, as many of them as the target has."""
        first, second = (self.lm.token_ids(reply.words)[: reply.target_tokens] for reply in (before, after))
        return first != second


def edit(
    lm: FrozenLM,
    editor: Editor | str | Path,
    requests: EditRequest | EditRecord | EditCase | Sequence[EditRequest | EditRecord | EditCase],
    *,
    joint: bool = False,
    ask: str | Sequence[str] = (),
    neighbours: int = 10,
    text: str = "tiny",
    max_new_tokens: int = 12,
    description: str | None = None,
    instruction: str | Mapping[str, str] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> EditReport:
    """Makes an edit for each request and reports what it did; the model is left unchanged.

    Args:
        lm: The model.
        editor: The editing method: an editor bound to the model, a name, or anything that `load_editor` takes.
        requests: What to change, one or several; records and cases have prompts of their own to ask.
        joint: Make one edit that serves all requests, rather than one for each.
        ask: Further prompts, or a single one, to ask for every edit.
        neighbours: Number of neighbours to draw for a request that has none.
        text: The text that drift is measured on, 256 tokens at most: the embedded sentences (``tiny``), a text file, a
            hub id, or text that the model generates itself (``sampled``, kept in the cache folder).
        max_new_tokens: Largest number of tokens in a reply.
        description: Id of the instruction's description (see `Editor.edit`).
        instruction: A free sentence to use instead.
        progress: Wraps the steps, e.g. ``tqdm``.

    Raises:
        UserError: If there is no request, no such editor, or a request does not suit it (see `Editor.edit`).
    """
    method = editor if isinstance(editor, Editor) else any_editor(editor, lm)
    given = [requests] if isinstance(requests, EditRequest | EditRecord | EditCase) else list(requests)
    if not given:
        raise UserError("no edit request given")
    cases = [EditCase.of(each) for each in given]
    instructor = method.instructor(description=description, instruction=instruction)
    judge = Judge(lm, ask, neighbours, text, max_new_tokens, instructor)

    def make(part: Sequence[EditCase]) -> Edit:
        with warnings.catch_warnings():  # the report says which requests failed
            warnings.filterwarnings("ignore", ".* did not reach their target", UserWarning)
            return method.edit([case.request for case in part], description, joint, instruction)

    whole = make(cases) if joint else None
    reports: list[RequestReport] = []
    edits: list[Edit] = [] if whole is None else [whole]
    for begin in progress(range(0, len(cases), _AT_ONCE)):
        part = cases[begin : begin + _AT_ONCE]
        change = make(part) if whole is None else whole
        reports += judge(part, change)
        edits += [change[i] for i in range(len(part))] if whole is None else []
    failed = any(not report.verdict.took for report in reports)
    return EditReport(
        lm.name, weights_fingerprint(lm), method.name, method.options(), joint, text, method.REMEDY if failed else "",
        tuple(reports), tuple(edits),
    )  # fmt: skip
