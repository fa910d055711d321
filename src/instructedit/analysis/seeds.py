"""Means over seeds with their uncertainty, from one value for each seed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from instructedit.metrics.intervals import Interval


def across_seeds(
    values: Iterable[float], level: float = 0.95, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Computes the mean of one value for each seed with Student's t interval; nan values are left out.

    Intervals over records show how a run varies over data; this one shows how a value varies when the editor is trained
    again. With two or three seeds the interval is wide, as it should be.

    Args:
        values: One number for each seed.
        level: Coverage, between 0 and 1.
        bounds: Range of the values; the interval is cut off there.

    Returns:
        The mean, the interval (nan for fewer than two seeds), and the number of seeds that counted.
    """
    from scipy.stats import t

    kept = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    mean = float(kept.mean()) if len(kept) else math.nan
    if len(kept) < 2:
        return Interval(mean, math.nan, math.nan, len(kept))
    half = float(t.ppf((1 + level) / 2, len(kept) - 1) * kept.std(ddof=1) / math.sqrt(len(kept)))
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), len(kept))


def interval_text(mean: float, low: float, high: float, digits: int = 1) -> str:
    """Formats a mean and its interval as ``0.53 [0.41, 0.66]``; the mean alone without one, a dash without a mean."""
    if math.isnan(mean):
        return "–"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if not (math.isnan(low) or math.isnan(high)) else ""
    return f"{mean:.{digits}f}{ends}"
