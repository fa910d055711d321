"""What the paper measures: pure functions, bootstrap intervals, and torchmetrics classes around them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from instructedit.metrics.functional import (
    ConvSentSuccess,
    agreement,
    answer_match,
    convsent_edit_success,
    exact_match,
    fluency,
    log_likelihood,
    ngram_entropy,
    row_mean,
    token_accuracy,
)
from instructedit.metrics.intervals import Interval, PairedDifference, bootstrap_interval, paired_difference

if TYPE_CHECKING:
    from instructedit.metrics.editing import (
        Fluency,
        Generalization,
        Locality,
        PerRecordMean,
        Portability,
        Reliability,
    )

__all__ = [
    "ConvSentSuccess",
    "Fluency",
    "Generalization",
    "Interval",
    "Locality",
    "PairedDifference",
    "PerRecordMean",
    "Portability",
    "Reliability",
    "agreement",
    "answer_match",
    "bootstrap_interval",
    "convsent_edit_success",
    "exact_match",
    "fluency",
    "log_likelihood",
    "ngram_entropy",
    "paired_difference",
    "row_mean",
    "token_accuracy",
]


def __getattr__(name: str) -> type:
    # The torchmetrics classes are imported at first use: torchmetrics takes seconds, and only training needs it.
    if name in __all__:
        found: type = getattr(import_module("instructedit.metrics.editing"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
