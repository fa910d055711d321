"""Locality (paper, equation 6)."""

from instructedit.metrics.base import EditingMetric


class Locality(EditingMetric):
    """Declares Locality, agreement with the unedited model on unrelated prompts."""

    name = "locality"
    title = "Locality"
    meaning = "share of answer tokens on unrelated prompts at which the edited model predicts what the unedited one did"
    place = 30
    probes = ("locality",)
    column = "agreement"
    chooses = True
    by_group = True
