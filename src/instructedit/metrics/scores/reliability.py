"""Reliability (paper, equation 4)."""

from instructedit.metrics.base import AnswerMetric


class Reliability(AnswerMetric):
    """Declares Reliability, accuracy on the edit request itself."""

    name = "reliability"
    title = "Reliability"
    meaning = "share of the target's tokens that the edited model predicts when it is asked the edit request itself"
    place = 10
    probes = ("reliability",)
    chooses = True
