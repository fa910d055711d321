"""Portability (paper, equation 7)."""

from instructedit.metrics.base import AnswerMetric


class Portability(AnswerMetric):
    """Declares Portability, accuracy on facts that follow from the edit."""

    name = "portability"
    title = "Portability"
    meaning = "the same share for what follows from the edit: other names of the subject, one step of reasoning"
    place = 40
    probes = ("portability",)
    by_group = True
