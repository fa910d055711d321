"""MQuAKE (Zhong et al. 2023): edits with questions whose answers take several facts, the edited one among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from instructedit.records import EditRecord, Probe
from instructedit.tasks.answers import filled, flat, restates
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.raw import Raw
from instructedit.tasks.rome import old_answers, rewrite

_REWRITES = "requested_rewrite"


class Mquake(Task):
    """Reader of ``requested_rewrite: [{prompt, subject, target_new, question}], questions, new_answer``.

    Each rewrite becomes an edit of its own; those of one record form a cluster. The questions of a record with several
    rewrites need all of these together and cannot test a single edit: they are left out and counted.
    """

    name = "mquake"
    title = "MQuAKE"
    fields = (
        "case_id", _REWRITES, "questions", "answer", "answer_alias", "new_answer", "new_answer_alias",
        "answer_extended", "single_hops", "new_single_hops", "orig",
    )  # fmt: skip

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if the record has a list of rewrites."""
        return isinstance(data.get(_REWRITES), list)

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the record's edits, except those whose target is the old answer."""
        rewrites, cluster = raw.objects(_REWRITES), report.record_id(raw)
        hops = self._multi_hop(raw, report)
        if len(rewrites) > 1:
            report.drop("question that takes several edits", len(hops))
            hops = []
        for number, asked in enumerate(rewrites):
            request = rewrite(asked, self.name)
            if restates(request.target, old_answers(asked), report):
                continue
            question = asked.optional_text("question")
            again = [Probe("generalization", question, (request.target,), "question")] if question else []
            own = cluster if len(rewrites) == 1 else f"{cluster}/{number}"
            yield EditRecord(own, request, (*again, *hops), cluster)

    def _multi_hop(self, raw: Raw, report: LoadReport) -> list[Probe]:
        aliases = raw.texts("new_answer_alias") if raw.has("new_answer_alias") else []
        answers = flat(filled([[raw.text("new_answer"), *aliases]], report), report)
        prompts = raw.texts("questions")
        report.drop("blank prompt", prompts.count(""))
        return [Probe("portability", prompt, answers, "Multi_Hop") for prompt in prompts if prompt]
