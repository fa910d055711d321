"""Locality towards other subjects."""

from instructedit.metrics.base import EditingMetric


class Neighborhood(EditingMetric):
    """Declares the agreement with the unedited model on the request's question about other subjects."""

    name = "neighborhood"
    title = "Neighborhood"
    meaning = "share of answer tokens as the unedited model predicts them where the same is asked about other subjects"
    place = 35
    headline = False
    probes = ("neighborhood",)
    column = "agreement"
    asked_instructed = True
