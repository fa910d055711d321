"""Recent: facts that are new to the model (KnowEdit's ``wiki_recent``)."""

from __future__ import annotations

import re

from instructedit.tasks.answers import Answers
from instructedit.tasks.base import LoadReport
from instructedit.tasks.knowedit import KnowEdit

_RULED_OUT = re.compile(r"which is not (.+), is$")


class Recent(KnowEdit):
    """Reader of KnowEdit records without an old answer."""

    name = "recent"
    title = "Recent"

    def allowed(self, group: str, prompt: str, answers: Answers, target: str, report: LoadReport) -> Answers:
        """Removes the target and its aliases from the answers of probes that exclude it ("..., which is not T, is").

        The prompt sometimes spells the target in another way than the edit does, so both spellings are removed.
        """
        if group != "Forgetfulness":
            return answers
        match = _RULED_OUT.search(prompt)
        ruled_out = {target.casefold(), match[1].casefold()} if match else {target.casefold()}
        left = [aliases for aliases in answers if ruled_out.isdisjoint(alias.casefold() for alias in aliases)]
        report.drop("answer that its probe rules out", len(answers) - len(left))
        return left
