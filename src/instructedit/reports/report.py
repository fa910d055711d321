"""Reports of what edits did: whether each took, what follows from it, and what else changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from instructedit.edits import Edit
from instructedit.evaluation.drift import Drift
from instructedit.pages import render
from instructedit.records import EditRequest
from instructedit.reports.cases import EditCase
from instructedit.reports.measure import Reply
from instructedit.reports.words import change, drift_line

_PAGE = Path(__file__).with_name("page.html")

Role = Literal["request", "instructed", "paraphrase", "neighbour", "ask"]


@dataclass(frozen=True)
class Answer:
    """One prompt before and after the edit.

    Attributes:
        role: ``request``; ``instructed`` (the request with its instruction in front, as an editor that takes one reads
            it); ``paraphrase``, ``neighbour`` or ``ask``.
        prompt: What the model was asked.
        group: Origin of the prompt: ``given`` by the user; else, for a neighbour, how it is related to the request.
        before: Reply of the unedited model.
        after: Reply of the edited model.
        changed: Whether the first tokens of the replies differ, as many of them as the target has.
    """

    role: Role
    prompt: str
    group: str
    before: Reply
    after: Reply
    changed: bool

    @property
    def spread(self) -> bool:
        """True if this is a neighbour that the edit hit: its answer changed, or is now the new target."""
        return self.role == "neighbour" and (self.changed or (self.after.predicted and not self.before.predicted))

    @property
    def title(self) -> str:
        """The role of the prompt in words, such as ``hit neighbour``."""
        name = "asked" if self.role == "ask" else self.role
        return f"hit {name}" if self.spread else name


@dataclass(frozen=True)
class Verdict:
    """The outcome of one edit request.

    Attributes:
        took: Whether the edited model predicts the target when asked without an instruction.
        known: Whether the unedited model did so, too.
        follow: Number of paraphrases that the edited model answers with the target, and of all paraphrases.
        spread: Number of neighbours that were hit, and of all neighbours.
    """

    took: bool
    known: bool
    follow: tuple[int, int]
    spread: tuple[int, int]

    @property
    def kind(self) -> Literal["took", "spread", "failed"]:
        """The outcome in a word: ``failed``, else ``spread`` if a neighbour was hit, else ``took``."""
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
    """The effects of the edit of one request.

    Attributes:
        request: The request.
        answers: Every prompt that was asked with its replies, the request first.
        drift: Change of the predictions on unrelated text.
    """

    request: EditRequest
    answers: tuple[Answer, ...]
    drift: Drift

    def of(self, role: Role) -> list[Answer]:
        """Returns the answers of one role."""
        return [answer for answer in self.answers if answer.role == role]

    @property
    def case(self) -> EditCase:
        """The request with the prompts that were asked, so that they can be asked again."""
        roles: tuple[Role, ...] = ("paraphrase", "neighbour", "ask")
        return EditCase(self.request, *(tuple(answer.prompt for answer in self.of(role)) for role in roles))

    @property
    def verdict(self) -> Verdict:
        """The outcome of the request."""
        own, paraphrases, neighbours = self.answers[0], self.of("paraphrase"), self.of("neighbour")
        return Verdict(
            own.after.predicted, own.before.predicted,
            (sum(answer.after.predicted for answer in paraphrases), len(paraphrases)),
            (sum(answer.spread for answer in neighbours), len(neighbours)),
        )  # fmt: skip


@dataclass(frozen=True)
class EditReport:
    """The effects of one or more edits on a model.

    Attributes:
        lm: Name of the model.
        fingerprint: Fingerprint of the model's weights (see `weights_fingerprint`).
        editor: Name of the editing method.
        options: Hyper-parameters of the method.
        joint: Whether one joint edit was made for all requests.
        text: The text that the drift was measured on.
        advice: What to change if a request failed, if the method has such advice.
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
        """Returns everything but the edits themselves as plain data, with non-finite numbers as None."""
        plain = asdict(replace(self, edits=()))
        del plain["edits"]
        for row, report in zip(plain["requests"], self.requests, strict=True):
            row["verdict"] = {"words": str(report.verdict), **asdict(report.verdict)}
            for answer, own in zip(row["answers"], report.answers, strict=True):
                answer["spread"] = own.spread
        finite: dict[str, Any] = _finite(plain)
        return finite

    def headline(self) -> str:
        """Summarises the outcome of all requests in one line."""
        verdicts = [each.verdict for each in self.requests]
        took = sum(verdict.took for verdict in verdicts)
        hit, asked = (sum(verdict.spread[i] for verdict in verdicts) for i in (0, 1))
        together = " in one edit" if self.joint else ""
        spread = f", spread to {hit or 'none'} of {asked} neighbours" if asked else ""
        return f"{took} of {len(verdicts)} requests took{together}{spread}"

    def save_json(self, file: str | Path) -> None:
        """Writes the report as JSON (see `to_dict`); its folder is created if needed."""
        _write(file, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def save_html(self, file: str | Path) -> None:
        """Writes the report as one self-contained HTML page without other files; its folder is created if needed."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items() if value is not None)
        facts = [("model", self.lm), ("editor", self.editor), ("options", options or "none"), ("text", self.text)]
        page = render(
            _PAGE, title=self.headline(), facts=facts, advice=self.advice, joint=self.joint,
            requests=[(each, drift_line(each.drift)) for each in self.requests], change=change,
        )  # fmt: skip
        _write(file, page)

    def each(self) -> Iterator[EditReport]:
        """Yields a separate report for each edit."""
        if len(self.edits) == 1:
            yield self
            return
        for report, edit in zip(self.requests, self.edits, strict=True):
            yield replace(self, requests=(report,), edits=(edit,))

    def __str__(self) -> str:
        return "\n".join(f"{r.request.prompt!r} → {r.request.target!r}: {r.verdict}" for r in self.requests)


def _write(file: str | Path, text: str) -> None:
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON cannot represent by None, in plain data."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
