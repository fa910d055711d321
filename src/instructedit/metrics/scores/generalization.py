"""Generalization (paper, equation 5)."""

from instructedit.metrics.base import AnswerMetric


class Generalization(AnswerMetric):
    """Declares Generalization, accuracy on paraphrases of the request."""

    name = "generalization"
    title = "Generalization"
    meaning = "share of the target's tokens that it predicts when it is asked in other words"
    place = 20
    probes = ("generalization",)
    chooses = True
