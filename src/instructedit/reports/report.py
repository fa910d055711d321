"""Makes edits and says what they did: did each take, what follows from it, what else moved."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from instructedit.editors import Editor, any_editor
from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.instructions import Instructor
from instructedit.lm import FrozenLM
from instructedit.records import EditRecord, EditRequest
from instructedit.reports.cases import EditCase
from instructedit.reports.measure import Drift, Reply, drifts, replies, text_sample
from instructedit.reports.neighbours import draw_neighbours, draw_paraphrases

Role = Literal["request", "instructed", "paraphrase", "neighbour", "ask"]
#: Requests that are edited and asked at once.
AT_ONCE = 4


@dataclass(frozen=True)
class Answer:
    """One prompt before and after the edit.

    Attributes:
        role: ``request``; ``instructed`` (the request behind the instruction, as an editor that takes one reads it);
            ``paraphrase``, ``neighbour`` or ``ask``.
        prompt: What the model was asked.
        group: Where it comes from: ``given`` by the user; else, for a neighbour, how it is related to the request.
        before: The unedited model.
        after: The edited one.
        changed: Whether the first words differ, as many tokens of them as the target has.
    """

    role: Role
    prompt: str
    group: str
    before: Reply
    after: Reply
    changed: bool

    @property
    def spread(self) -> bool:
        """Whether a neighbour was hit: it answers with the new target now, or otherwise than before."""
        return self.role == "neighbour" and (self.changed or (self.after.predicted and not self.before.predicted))


@dataclass(frozen=True)
class Verdict:
    """What became of one request.

    Attributes:
        took: Whether the edited model predicts the target, asked plainly.
        known: Whether the unedited model did, too.
        follow: Paraphrases that it answers with the target, of how many.
        spread: Neighbours that were hit, of how many.
    """

    took: bool
    known: bool
    follow: tuple[int, int]
    spread: tuple[int, int]

    @property
    def kind(self) -> Literal["took", "spread", "failed"]:
        """The worst of it, in a word."""
        return "failed" if not self.took else "spread" if self.spread[0] else "took"

    def __str__(self) -> str:
        parts = ["took, as before the edit" if self.took and self.known else "took" if self.took else "failed"]
        if self.follow[1]:
            parts.append(f"{self.follow[0]} of {self.follow[1]} paraphrases follow")
        if self.spread[1]:
            parts.append(f"spread to {self.spread[0] or 'none'} of {self.spread[1]} neighbours")
        return "; ".join(parts)


@dataclass(frozen=True)
class RequestReport:
    """What one request's edit did.

    Attributes:
        request: The request.
        answers: What was asked, the request first.
        drift: How far text that it is not about moved.
    """

    request: EditRequest
    answers: tuple[Answer, ...]
    drift: Drift

    def of(self, role: Role) -> list[Answer]:
        """The answers of one role."""
        return [answer for answer in self.answers if answer.role == role]

    @property
    def case(self) -> EditCase:
        """The request with the prompts that were asked, to ask them again."""
        roles: tuple[Role, ...] = ("paraphrase", "neighbour", "ask")
        return EditCase(self.request, *(tuple(answer.prompt for answer in self.of(role)) for role in roles))

    @property
    def verdict(self) -> Verdict:
        """What became of it."""
        own, paraphrases, neighbours = self.answers[0], self.of("paraphrase"), self.of("neighbour")
        return Verdict(
            own.after.predicted, own.before.predicted,
            (sum(answer.after.predicted for answer in paraphrases), len(paraphrases)),
            (sum(answer.spread for answer in neighbours), len(neighbours)),
        )  # fmt: skip


@dataclass(frozen=True)
class EditReport:
    """What edits did.

    Attributes:
        lm: Name of the model.
        fingerprint: Of the model, which tells it from others.
        editor: Name of the method.
        options: Its hyper-parameters.
        joint: Whether one edit was made of all requests.
        text: What the drift was measured on.
        advice: What to change if a request failed, where the method knows it.
        requests: One report for each request.
        edits: The edits: one for each request, or the one that serves them all.
    """

    lm: str
    fingerprint: str
    editor: str
    options: Mapping[str, Any]
    joint: bool
    text: str
    advice: str
    requests: tuple[RequestReport, ...]
    edits: tuple[Edit, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data of everything but the edits themselves; numbers that are not finite are None."""
        plain = asdict(replace(self, edits=()))
        del plain["edits"]
        for row, report in zip(plain["requests"], self.requests, strict=True):
            row["verdict"] = {"words": str(report.verdict), **asdict(report.verdict)}
            for answer, own in zip(row["answers"], report.answers, strict=True):
                answer["spread"] = own.spread
        finite: dict[str, Any] = _finite(plain)
        return finite

    def save_json(self, file: str | Path) -> None:
        """Writes `to_dict`."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def save_html(self, file: str | Path) -> None:
        """Writes one page that needs nothing else, neither network nor folder."""
        from instructedit.reports.page import page

        Path(file).write_text(page(self), encoding="utf-8")

    def each(self) -> Iterator[EditReport]:
        """Takes the report apart: one for each edit."""
        if len(self.edits) == 1:
            yield self
            return
        for report, edit in zip(self.requests, self.edits, strict=True):
            yield replace(self, requests=(report,), edits=(edit,))

    def __str__(self) -> str:
        return "\n".join(f"{r.request.prompt!r} → {r.request.target!r}: {r.verdict}" for r in self.requests)


class Judge:
    """Asks a model of its edits.

    Args:
        lm: The model.
        ask: Further prompts to ask of every edit.
        neighbours: How many are drawn for a case that brings none.
        text: What drift is measured on.
        max_new_tokens: Length of the words.
        instructor: Of an editor that reads instructions: requests are asked behind theirs, too.
    """

    def __init__(
        self, lm: FrozenLM, ask: Sequence[str] = (), neighbours: int = 10, text: str = "tiny", max_new_tokens: int = 12,
        instructor: Instructor | None = None,
    ) -> None:  # fmt: skip
        self.lm, self.ask, self.neighbours, self.instructor = lm, tuple(ask), neighbours, instructor
        self.max_new_tokens = max_new_tokens
        self.sample = text_sample(lm, text)

    def __call__(self, cases: Sequence[EditCase], edit: Edit) -> list[RequestReport]:
        """Asks all cases of their edits at once: of one for each, or of the one that serves them all."""
        start = self.lm.first_block(edit.sites)
        moved = drifts(self.lm, self.sample, edit, start)
        prompts = [list(self._prompts(case)) for case in cases]
        asked = [(p, case.request.target) for case, own in zip(cases, prompts, strict=True) for _, p, _ in own]
        rows = [i % len(edit) for i, own in enumerate(prompts) for _ in own]
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
        """Role, prompt and group of all that is asked of a case."""
        prompt = case.request.prompt
        yield "request", prompt, ""
        if self.instructor and (instructed := self.instructor.front(case.request)(prompt)) != prompt:
            yield "instructed", instructed, ""
        yield from (("paraphrase", each, "given") for each in case.paraphrases)
        if not case.paraphrases:
            yield from (("paraphrase", each, "drawn") for each in draw_paraphrases(case.request))
        yield from (("neighbour", each, "given") for each in case.neighbours)
        if not case.neighbours:
            yield from (("neighbour", *each) for each in draw_neighbours(case.request, self.neighbours))
        yield from (("ask", each, "") for each in (*case.ask, *self.ask))

    def _differ(self, before: Reply, after: Reply) -> bool:
        """Whether the first words of two replies differ, as many tokens as the target has."""
        first, second = (self.lm.words(reply.words)[: reply.target_tokens] for reply in (before, after))
        return first != second


def edit(
    lm: FrozenLM,
    editor: Editor | str | Path,
    requests: EditRequest | EditRecord | EditCase | Sequence[EditRequest | EditRecord | EditCase],
    *,
    joint: bool = False,
    ask: Sequence[str] = (),
    neighbours: int = 10,
    text: str = "tiny",
    max_new_tokens: int = 12,
    description: str | None = None,
    instruction: str | Mapping[str, str] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> EditReport:
    """Makes an edit for each request and reports what it did; the model stays as it is.

    Args:
        lm: The model.
        editor: The method: bound to the model, by its name, or what `load_editor` takes.
        requests: What to change, one or several; records and cases bring prompts of their own to ask.
        joint: Make one edit that serves all requests, rather than one for each.
        ask: Further prompts to ask of every edit.
        neighbours: How many are drawn for a request that brings none.
        text: What drift is measured on, 256 tokens at most: the embedded sentences (``tiny``), a file of text, a hub
            id, or what the model says itself (``sampled``, kept in the cache folder).
        max_new_tokens: Length of the words.
        description: Id of the instruction's description (see `Editor.edit`).
        instruction: A free sentence in its place.
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
    judge = Judge(lm, tuple(ask), neighbours, text, max_new_tokens, instructor)

    def make(part: Sequence[EditCase]) -> Edit:
        with warnings.catch_warnings():  # the report says which requests failed
            warnings.filterwarnings("ignore", ".* did not reach their target", UserWarning)
            return method.edit([case.request for case in part], description, joint, instruction)

    whole = make(cases) if joint else None
    reports: list[RequestReport] = []
    edits: list[Edit] = [] if whole is None else [whole]
    for begin in progress(range(0, len(cases), AT_ONCE)):
        part = cases[begin : begin + AT_ONCE]
        change = make(part) if whole is None else whole
        reports += judge(part, change)
        edits += [change[i] for i in range(len(part))] if whole is None else []
    failed = any(not report.verdict.took for report in reports)
    return EditReport(
        lm.name, lm.fingerprint, method.name, method.options(), joint, text, method.REMEDY if failed else "",
        tuple(reports), tuple(edits),
    )  # fmt: skip


def _finite(value: Any) -> Any:
    """Plain data in which numbers that JSON does not know are None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
