"""The record schema of KnowEdit (Zhang et al. 2024), which CounterFact, Recent and one form of ZsRE share."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.tasks.answers import GROUPS, Answers, filled, flat, has_groups, restates
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.flat import FIELDS, Flat
from instructedit.tasks.raw import Raw

_ALIASING = "Subject_Aliasing"
_REPHRASES = ("rephrase", "rephrase_prompt")


class KnowEdit(Task):
    """Reader of ``prompt, target_new, [subject], [ground_truth], [rephrase | rephrase_prompt], portability, locality``.

    ``portability`` and ``locality`` hold groups of ``{prompt, ground_truth}``. Where a record has no rephrasing of its
    own, its Subject_Aliasing probes, which restate the edit with another name of its subject, also serve as one; they
    stay in portability too, where KnowEdit puts them.
    """

    fields: Collection[str] = (
        "subject", "prompt", "target_new", "ground_truth", *_REPHRASES, *GROUPS, "case_id", "id", "pred", "cond",
    )  # fmt: skip
    lists: Collection[str] = Flat().lists

    def reader(self, raws: Sequence[Raw]) -> Task:
        """Returns this task, or the flat form's reader for records in that form, which EasyEdit uses for these too."""
        others = {name for names in FIELDS.values() for name in names} - set(self.fields)
        flat_ones = any(Flat.recognises(raw.data) and not others.isdisjoint(raw.data) for raw in raws)
        if flat_ones and not any(has_groups(raw.data) for raw in raws):  # the flat reader does not know aliasing groups
            return Flat().called(self.name, self.title)
        return self

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the record's edit, unless its target is the old answer."""
        target = raw.text("target_new")
        request = EditRequest(raw.text("prompt"), target, task=self.name, subject=raw.optional_text("subject"))
        old = raw.answers("ground_truth") if raw.has("ground_truth") else []
        if restates(target, old, report):
            return
        portability = list(self._grouped(raw, "portability", target, report))
        general = list(rephrasings(raw, target, report)) or list(restated(portability, target, report))
        probes = (*general, *portability, *self._grouped(raw, "locality", target, report))
        report.note("probe that comes again in its record", len(probes) - len(set(probes)))
        yield EditRecord(report.record_id(raw), request, probes)

    def allowed(self, group: str, prompt: str, answers: Answers, target: str, report: LoadReport) -> Answers:
        """Returns the answers that the probe itself does not rule out: here all of them; a subclass may narrow them."""
        return answers

    def _grouped(
        self, raw: Raw, kind: Literal["portability", "locality"], target: str, report: LoadReport
    ) -> Iterator[Probe]:
        if not raw.has(kind):
            report.note(f"record without {kind}")
        for group, items in raw.groups(kind).items():
            if not items:
                report.drop("probe group empty")
            for item in items:
                prompt, answers = item.text("prompt"), filled(item.answers("ground_truth"), report)
                if not answers:
                    report.drop("probe without an answer")
                elif not (left := self.allowed(group, prompt, answers, target, report)):
                    report.drop("probe answer equals the target")
                else:
                    yield Probe(kind, prompt, flat(left, report), group)


def rephrasings(raw: Raw, target: str, report: LoadReport) -> Iterator[Probe]:
    """Yields generalization probes from the record's own rephrasings: one text or a list of texts."""
    for name in _REPHRASES:
        for prompt in itertools.chain.from_iterable(raw.answers(name) if raw.has(name) else []):
            if prompt:
                yield Probe("generalization", prompt, (target,), "rephrase")
            else:
                report.drop("blank rephrase")


def restated(probes: list[Probe], target: str, report: LoadReport) -> Iterator[Probe]:
    """Yields generalization probes from Subject_Aliasing; the edit's target comes first among their answers."""
    for probe in probes:
        if probe.group == _ALIASING:
            report.note("alias probe that does not list the target", target not in probe.answers)
            yield Probe("generalization", probe.prompt, tuple(dict.fromkeys((target, *probe.answers))), _ALIASING)
