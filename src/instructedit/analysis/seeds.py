"""What several seeds say: the mean of one figure a seed, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from instructedit.metrics.intervals import Interval


def across_seeds(
    values: Iterable[float], level: float = 0.95, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Mean of one value a seed with Student's t interval, nan values left out.

    Records say how a run varies over data; this says how the figure varies when the editor is trained again. With two
    or three seeds the interval is wide, as it should be.

    Args:
        values: One number a seed.
        level: Coverage, between 0 and 1.
        bounds: Between which the values lie; the interval is cut there.

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
    """``0.53 [0.41, 0.66]``; without an interval the mean alone, without a mean a dash."""
    if math.isnan(mean):
        return "–"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if not (math.isnan(low) or math.isnan(high)) else ""
    return f"{mean:.{digits}f}{ends}"
