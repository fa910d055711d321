"""The paper's metrics: their declarations, pure functions, bootstrap intervals, and the average for the Trainer."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from instructedit.metrics.base import (
    AnswerMetric,
    EditingMetric,
    editing_metrics,
    headline_metrics,
    metric_title,
)

if TYPE_CHECKING:
    from instructedit.metrics.averaging import PerRecordMean
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

_MODULES = {
    "averaging": ("PerRecordMean",),
    "functional": (
        "ConvSentSuccess",
        "agreement",
        "answer_match",
        "convsent_edit_success",
        "exact_match",
        "fluency",
        "log_likelihood",
        "ngram_entropy",
        "row_mean",
        "token_accuracy",
    ),
    "intervals": ("Interval", "PairedDifference", "bootstrap_interval", "paired_difference"),
}

__all__ = [
    "AnswerMetric",
    "ConvSentSuccess",
    "EditingMetric",
    "Interval",
    "PairedDifference",
    "PerRecordMean",
    "agreement",
    "answer_match",
    "bootstrap_interval",
    "convsent_edit_success",
    "editing_metrics",
    "exact_match",
    "fluency",
    "headline_metrics",
    "log_likelihood",
    "metric_title",
    "ngram_entropy",
    "paired_difference",
    "row_mean",
    "token_accuracy",
]


def __getattr__(name: str) -> Any:
    # Imported at first use: torchmetrics takes seconds to import, and a table needs no torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    if (declared := editing_metrics().get(name.lower())) and name == declared.title:
        warnings.warn(
            f"instructedit.metrics.{name} is PerRecordMean(scale={declared.scale:g}) now; its old name goes next",
            DeprecationWarning,
            stacklevel=2,
        )
        return partial(import_module(f"{__name__}.averaging").PerRecordMean, scale=declared.scale)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
