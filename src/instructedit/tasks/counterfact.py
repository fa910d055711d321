"""CounterFact: a fact that the model knows is changed (KnowEdit's ``wiki_counterfact``)."""

from __future__ import annotations

from collections.abc import Mapping

from instructedit.tasks.answers import has_groups
from instructedit.tasks.knowedit import KnowEdit


class CounterFact(KnowEdit):
    """Reader of KnowEdit records with the old answer in ``ground_truth``."""

    name = "counterfact"
    title = "CounterFact"

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if the record has KnowEdit's form; Recent and ZsRE share it, and are chosen by name alone."""
        return has_groups(data)
