"""CounterFact in the form of ROME (Meng et al. 2022): a statement to be completed, with nearby ones that must stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.tasks.answers import restates
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.raw import Raw

_REWRITE = "requested_rewrite"


def rewrite(raw: Raw, task: str) -> EditRequest:
    """Makes the request of a rewrite, ``{prompt with {}, subject, target_new{str}}``, as ROME and MQuAKE write it."""
    subject = raw.text("subject")
    prompt = raw.text("prompt").replace("{}", subject)
    return EditRequest(prompt, raw.child("target_new").text("str"), task=task, subject=subject)


def old_answers(raw: Raw) -> list[list[str]]:
    """Returns the answer that a rewrite replaces, if it names one."""
    return [[raw.child("target_true").text("str")]] if raw.has("target_true") else []


class RomeCounterFact(Task):
    """Reader of ``requested_rewrite, paraphrase_prompts, neighborhood_prompts``.

    The neighbours share the relation and the old answer with the request, so the old answer is theirs too.
    ``attribute_prompts`` and ``generation_prompts`` are not asked, as no metric here uses them.
    """

    name = "rome"
    title = "CounterFact (ROME)"
    fields = (
        "case_id", "pararel_idx", _REWRITE, "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts",
        "generation_prompts",
    )  # fmt: skip

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if the record has one rewrite."""
        return isinstance(data.get(_REWRITE), dict)

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the record's edit, unless its target is the old answer."""
        asked = raw.child(_REWRITE)
        request, old = rewrite(asked, self.name), old_answers(asked)
        if restates(request.target, old, report):
            return
        probes = [
            Probe("generalization", prompt, (request.target,), "paraphrase")
            for prompt in self._prompts(raw, "paraphrase_prompts", report)
        ]
        neighbours = self._prompts(raw, "neighborhood_prompts", report)
        if old:
            probes += [Probe("locality", prompt, tuple(old[0]), "Neighborhood") for prompt in neighbours]
        else:
            report.drop("probe without an answer", len(neighbours))
        yield EditRecord(report.record_id(raw), request, tuple(probes))

    def _prompts(self, raw: Raw, field: str, report: LoadReport) -> list[str]:
        """Returns the field's prompts without blank ones, which are counted."""
        every = raw.texts(field) if raw.has(field) else []
        report.drop("blank prompt", every.count(""))
        return [prompt for prompt in every if prompt]
