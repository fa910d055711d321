"""Fluency (paper, equation 8)."""

from instructedit.metrics.base import EditingMetric


class Fluency(EditingMetric):
    """Declares Fluency, the n-gram entropy of text that the edited model samples."""

    name = "fluency"
    title = "Fluency"
    meaning = "n-gram entropy of text that it samples; about 600 for 100 fluent tokens, low where it repeats itself"
    place = 50
    probes = ("fluency",)
    column = "fluency"
    scale = 1.0
