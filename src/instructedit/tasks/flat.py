"""The flat form of records, with one field for each item, as in EasyEdit's data, QAEdit and users' own tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from instructedit.errors import unknown
from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.tasks.answers import Answers, filled, flat, has_groups, restates
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.raw import Raw

#: Names that each field may have; the first one is documented, the others are those of public datasets.
FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "src"),
    "target": ("target", "target_new", "alt"),
    "subject": ("subject",),
    "old": ("old", "ground_truth", "target_true"),
    "rephrase": ("rephrase", "rephrases", "rephrase_prompt", "rephrase_prompts", "paraphrases"),
    "locality": ("locality", "locality_prompt", "locality_prompts", "neighbours", "neighbors"),
    "locality_answer": ("locality_answer", "locality_answers", "locality_ground_truth"),
    "portability": ("portability", "portability_prompt", "portability_prompts"),
    "portability_answer": ("portability_answer", "portability_answers", "portability_ground_truth"),
    "slots": ("slots",),
}
#: Fields that hold several texts: a list, or one CSV cell.
LISTS = ("rephrase", "locality", "locality_answer", "portability", "portability_answer")
#: Fields with a record's origin and other names for it, which are known but not used here.
UNUSED = ("id", "case_id", "source", "task", "relation_id", "relation", "pred", "cond")
_PROMPT, _ANSWER = ("prompt", "loc"), ("answer", "answers", "ground_truth", "loc_ans")

Kind = Literal["locality", "portability"]


class Flat(Task):
    """Reader of ``prompt, target, [subject], [old], [rephrase], [locality, locality_answer], …``.

    Probes are given by two fields, prompts and their answers in the same order, or by one: a list of
    ``{prompt, answer}``, or groups of such lists by name.

    Args:
        fields: Field → its name or names in the records, for those that have names of their own.

    Raises:
        UserError: If there is no such field.
    """

    name = FORMAT = "flat"
    title = "Facts"

    def __init__(self, fields: Mapping[str, str | list[str]] | None = None) -> None:
        own = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in (fields or {}).items()}
        for key in own:
            if key not in FIELDS:
                raise unknown("field", key, list(FIELDS))
        self.names = FIELDS | own
        self.fields = {*UNUSED, *(name for names in self.names.values() for name in names)}
        self.lists = {name for field in LISTS for name in self.names[field]}

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if the record has a prompt and a target, and neither KnowEdit's groups of probes nor MEND's ``src``."""
        there = all(any(name in data for name in FIELDS[field]) for field in ("prompt", "target"))
        return there and not has_groups(data) and "src" not in data

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the record's edit, unless its target is the old answer."""
        target = raw.text(self._name(raw, "target"))
        old = raw.answers(name) if raw.has(name := self._name(raw, "old")) else []
        if restates(target, old, report):
            return
        request = EditRequest(
            raw.text(self._name(raw, "prompt")), target, task=self.name,
            subject=raw.optional_text(self._name(raw, "subject")), slots=self._slots(raw),
        )  # fmt: skip
        probes = (
            *(Probe("generalization", prompt, (target,), "rephrase") for prompt in self._rephrasings(raw, report)),
            *self._probes(raw, "portability", report),
            *self._probes(raw, "locality", report),
        )
        report.note("probe that comes again in its record", len(probes) - len(set(probes)))
        yield EditRecord(report.record_id(raw), request, probes)

    def _name(self, raw: Raw, field: str) -> str:
        """Returns the name that a field has in the record.

        Raises:
            UserError: If the record has the field under two names.
        """
        there = [name for name in self.names[field] if raw.has(name)]
        if len(there) > 1:
            raise raw.error(f"fields {there[0]!r} and {there[1]!r} mean the same: leave one out")
        return there[0] if there else self.names[field][0]

    def _rephrasings(self, raw: Raw, report: LoadReport) -> Iterator[str]:
        name = self._name(raw, "rephrase")
        prompts = [prompt for same in raw.answers(name) for prompt in same] if raw.has(name) else []
        report.drop("blank rephrase", prompts.count(""))
        yield from filter(None, prompts)

    def _probes(self, raw: Raw, kind: Kind, report: LoadReport) -> Iterator[Probe]:
        name = self._name(raw, kind)
        if not raw.has(name):
            report.note(f"record without {kind}")
            return
        value = raw.data[name]
        asked: Iterator[tuple[str, str, Answers]]
        if isinstance(value, dict):
            asked = ((group, *_asked(item)) for group, items in raw.groups(name).items() for item in items)
        elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
            asked = (("", *_asked(item)) for item in raw.objects(name))
        else:
            asked = self._paired(raw, kind, name)
        for group, prompt, answers in asked:
            if left := filled(answers, report):
                yield Probe(kind, prompt, flat(left, report), group)
            else:
                report.drop("probe without an answer")

    def _paired(self, raw: Raw, kind: Kind, name: str) -> Iterator[tuple[str, str, Answers]]:
        """Pairs the prompts and the answers of two fields."""
        prompts = [prompt for same in raw.answers(name) for prompt in same]
        field = self._name(raw, f"{kind}_answer")
        answers = raw.answers(field) if raw.has(field) else []
        if len(prompts) == 1 and len(answers) > 1:  # one prompt with aliases
            answers = [[alias for aliases in answers for alias in aliases]]
        if len(prompts) != len(answers):
            raise raw.error(f"field {name!r} has {len(prompts)} prompts and {field!r} {len(answers)} answers: one each")
        if "" in prompts:
            raise raw.error(f"field '{name}[{prompts.index('')}]' is empty")
        yield from (("", prompt, [aliases]) for prompt, aliases in zip(prompts, answers, strict=True))

    def _slots(self, raw: Raw) -> dict[str, str]:
        name = self._name(raw, "slots")
        slots = raw.child(name) if raw.has(name) else None
        return {slot: slots.text(slot) for slot in slots.data} if slots else {}


def prompt_of(item: Raw) -> str:
    """Returns the prompt of an object that describes a probe, under any of its names."""
    return item.text(_there(item, _PROMPT))


def _asked(item: Raw) -> tuple[str, Answers]:
    """Returns the prompt and the answers of such an object."""
    return prompt_of(item), item.answers(_there(item, _ANSWER))


def _there(item: Raw, names: tuple[str, ...]) -> str:
    return next(filter(item.has, names), names[0])
