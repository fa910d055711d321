"""Edits in plain text: the request, its probes, and the record that holds both. This module does without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from instructedit.errors import UserError

ProbeKind = Literal["reliability", "generalization", "locality", "portability", "wanted", "opposite", "neighborhood"]

#: Every kind of probe; ``wanted`` and ``opposite`` are ConvSent's replies with the wanted sentiment and with the other,
#: ``neighborhood`` is what the request asks about another subject (see `data.neighborhood`).
KINDS: tuple[str, ...] = get_args(ProbeKind)
#: Kinds that should give their own answer after the edit.
IN_SCOPE = ("reliability", "generalization", "portability")
#: Kinds that an edit should leave alone; where they count, they are asked without an instruction.
OUT_OF_SCOPE = ("locality", "neighborhood")
#: Kinds of ConvSent's probes: replies of the wanted sentiment, and of the other.
REPLIES = ("wanted", "opposite")


def stripped(prompt: str) -> str:
    """Strips leading white space and trailing spaces from a prompt; a final newline stays."""
    return prompt.lstrip().rstrip(" \t\r\f\v\u00a0\u3000")


def is_text(value: str) -> bool:
    """True if a string can be encoded as UTF-8: JSON may hold half a surrogate pair, which no tokenizer reads."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


@dataclass(frozen=True)
class EditRequest:
    """One change that a user wants: after the edit the model continues ``prompt`` with ``target``.

    Attributes:
        prompt: What the model is asked, without an instruction. Stray spaces are removed (see `stripped`).
        target: How it should continue; surrounding white space is removed.
        task: Name of the editing task, which chooses the instruction bank; None for an edit without a task.
        subject: The entity that the edit is about, where the data names it.
        slots: Values for the slots of the task's instructions, such as ``{"LABEL": "positive"}``.

    Raises:
        UserError: If the prompt or the target is empty.
    """

    prompt: str
    target: str
    task: str | None = None
    subject: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"edit request: {name} must be a non-empty string, got {value!r}")
            if not is_text(value):
                raise UserError(f"edit request: {name} holds half a surrogate pair, which is no text: {value!r}")
        object.__setattr__(self, "prompt", stripped(self.prompt))
        object.__setattr__(self, "target", self.target.strip())


@dataclass(frozen=True)
class Probe:
    """A question that shows what an edit did.

    Attributes:
        kind: The metric that it belongs to.
        prompt: What the model is asked, without an instruction. Stray spaces are removed (see `stripped`).
        answers: The right answer first, then its aliases; any of them counts. Out of scope the first answer only
            fixes the positions at which the edited and the unedited model are compared. White space around them is
            removed.
        group: The dataset's own name for this kind of probe, e.g. ``Relation_Specificity``.
    """

    kind: ProbeKind
    prompt: str
    answers: tuple[str, ...]
    group: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"probe: unknown kind {self.kind!r}; one of {', '.join(KINDS)}")
        if not self.prompt.strip():
            raise UserError(f"{self.kind} probe: empty prompt")
        if not self.answers or not all(a.strip() for a in self.answers):
            raise UserError(f"{self.kind} probe {self.prompt!r}: empty answer")
        if not all(map(is_text, (self.prompt, *self.answers))):
            raise UserError(f"{self.kind} probe {self.prompt!r}: holds half a surrogate pair, which is no text")
        object.__setattr__(self, "prompt", stripped(self.prompt))
        object.__setattr__(self, "answers", tuple(answer.strip() for answer in self.answers))


@dataclass(frozen=True)
class EditRecord:
    """An edit request with the probes that score it.

    Attributes:
        id: Unique within its dataset; results are keyed by it.
        request: The edit.
        probes: Everything to ask the edited model besides the request itself.
        cluster: Records of one cluster are averaged before they count (ConvSent: the ten cases of one topic), and
            the bootstrap resamples clusters. Defaults to the id.
    """

    id: str
    request: EditRequest
    probes: tuple[Probe, ...] = ()
    cluster: str = ""

    def __post_init__(self) -> None:
        if not self.cluster:
            object.__setattr__(self, "cluster", self.id)

    @property
    def task(self) -> str:
        """Name of the task that the record belongs to."""
        return self.request.task or "edit"

    @property
    def reliability(self) -> Probe:
        """The request itself, as a probe."""
        return Probe("reliability", self.request.prompt, (self.request.target,))

    def of(self, *kinds: str) -> tuple[Probe, ...]:
        """Returns the probes of the given kinds, in order; ``reliability`` is the request itself."""
        own = (self.reliability,) if "reliability" in kinds else ()
        return own + tuple(p for p in self.probes if p.kind in kinds)
