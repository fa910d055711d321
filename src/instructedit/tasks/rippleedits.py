"""RippleEdits (Cohen et al. 2024): edits with tests of what follows from them and of what must not change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from instructedit.records import EditRecord, EditRequest, Probe, ProbeKind
from instructedit.tasks.answers import filled, flat, restates
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.knowedit import restated
from instructedit.tasks.raw import Raw

#: Group of tests → the kind of its probes; the first one's name is misspelt in some copies.
_GROUPS: dict[str, ProbeKind] = {
    "Relation_Specificity": "locality",
    "Relation_Specifity": "locality",
    "Forgetfulness": "locality",
    "Subject_Aliasing": "portability",
    "Logical_Generalization": "portability",
    "Compositionality_I": "portability",
    "Compositionality_II": "portability",
}
_VERB = re.compile(r" (?:is|are|was|were) ")


class RippleEdits(Task):
    """Reader of ``edit{prompt, [target, subject], [original_fact{prompt}]}`` and groups of ``{test_queries}``.

    The edit is a whole sentence, which is split after its last verb that the old fact's sentence shares; a sentence
    that cannot be split is left out and counted. The form has no text for the subject, so methods that need one cannot
    use it. A test's ``condition_queries`` are not asked: the original counts a test only if the model knows their
    answers.
    """

    name = "rippleedits"
    title = "RippleEdits"
    fields = ("example_type", "edit", *_GROUPS)

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if the record has an edit and at least one of the groups."""
        return isinstance(data.get("edit"), dict) and not _GROUPS.keys().isdisjoint(data)

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the record's edit, unless its sentence cannot be split or its target is the old answer."""
        edit = raw.child("edit")
        sentence = edit.text("prompt")
        before = edit.child("original_fact").text("prompt") if edit.has("original_fact") else None
        parts = _parted(sentence, before, edit.optional_text("target"))
        if parts is None:
            report.drop("edit whose sentence cannot be parted into prompt and target")
            return
        prompt, target = parts
        if restates(target, [[_target(before[len(prompt) :])]] if before else [], report):
            return
        probes = [probe for group, kind in _GROUPS.items() for probe in _tests(raw, group, kind, report)]
        request = EditRequest(prompt, target, task=self.name, subject=edit.optional_text("subject"))
        yield EditRecord(report.record_id(raw), request, (*restated(probes, target, report), *probes))


def _parted(sentence: str, before: str | None, target: str | None) -> tuple[str, str] | None:
    """Splits a sentence such as "The name of the capital of Peru is Lima." into prompt and target."""
    if target and _target(sentence).endswith(f" {target}"):
        return _target(sentence)[: -len(target)].strip(), target
    for verb in reversed(list(_VERB.finditer(sentence))):
        prompt, rest = sentence[: verb.end()].strip(), _target(sentence[verb.end() :])
        if rest and (before is None or before.startswith(f"{prompt} ")):
            return prompt, rest
    return None


def _target(text: str) -> str:
    return text.strip().removesuffix(".").strip()


def _tests(raw: Raw, group: str, kind: ProbeKind, report: LoadReport) -> Iterator[Probe]:
    for test in raw.objects(group) if raw.has(group) else []:
        report.note("test whose condition queries are not asked", bool(test.data.get("condition_queries")))
        for query in test.objects("test_queries"):
            answers = [
                [item.text("value"), *_aliases(item)] for item in query.objects("answers") if item.data.get("value")
            ]
            if left := filled(answers, report):
                yield Probe(kind, query.text("prompt"), flat(left, report), group)
            else:
                report.drop("probe without an answer")


def _aliases(answer: Raw) -> list[str]:
    return answer.texts("aliases") if answer.has("aliases") else []
