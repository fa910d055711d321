"""ZsRE: questions about a subject (Levy et al. 2017), in the two forms that editing data use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.tasks.answers import filled, flat, restates
from instructedit.tasks.base import LoadReport
from instructedit.tasks.knowedit import KnowEdit, rephrasings
from instructedit.tasks.raw import Raw


class ZsRE(KnowEdit):
    """Reader of KnowEdit records, or of MEND's with the portability of Yao et al. (2023), which have a field ``src``.

    The second form is ``src, alt, answers, rephrase, loc, loc_ans, portability{New Question, New Answer}``.
    """

    name = "zsre"
    title = "ZsRE"
    fields = (*KnowEdit.fields, "src", "alt", "answers", "loc", "loc_ans")

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if the record has MEND's form."""
        return {"src", "alt"} <= data.keys()

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the record's edit, from either form, unless its target is already an answer."""
        records = self._from_mend(raw, report) if raw.has("src") else super().parse(raw, report)
        for record in records:
            target = record.request.target.casefold()
            leaks = sum(target in probe.prompt.casefold() for probe in record.of("portability"))
            report.note("portability question that contains the target", leaks)
            yield record

    def _from_mend(self, raw: Raw, report: LoadReport) -> Iterator[EditRecord]:
        target = raw.text("alt")
        request = EditRequest(raw.text("src"), target, task=self.name, subject=raw.optional_text("subject"))
        if restates(target, raw.answers("answers"), report):
            return
        probes = [*rephrasings(raw, target, report)]
        if raw.has("portability"):
            asked = raw.child("portability")
            question, answer = asked.text("New Question"), _answer(asked, "New Answer", report)
            probes += [Probe("portability", question, answer, "Reasoning")] if answer else []
        else:
            report.note("record without portability")
        # Published results are for "nq question: ..." as it is in the data, so the prefix stays.
        question, answer = raw.text("loc"), _answer(raw, "loc_ans", report)
        probes += [Probe("locality", question, answer, "NQ")] if answer else []
        yield EditRecord(report.record_id(raw), request, tuple(probes))


def _answer(raw: Raw, field: str, report: LoadReport) -> tuple[str, ...]:
    found = flat(filled(raw.answers(field), report), report)
    if not found:
        report.drop("probe without an answer")
    return found
