"""CounterFact: a fact that the model knows is changed (KnowEdit's ``wiki_counterfact``)."""

from __future__ import annotations

from instructedit.tasks.knowedit import KnowEdit


class CounterFact(KnowEdit):
    """KnowEdit records with the old answer in ``ground_truth``."""

    name = "counterfact"
    title = "CounterFact"
