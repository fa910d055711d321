"""Uncertainty of means: percentile bootstrap over records or clusters of records, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK = 2_000_000  # random draws held at once: 16 MB of indices


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval, in the unit of the values.

    Attributes:
        mean: Mean of the cluster means; nan without values.
        low: Lower bound; nan for fewer than two clusters, which tell nothing about the spread.
        high: Upper bound; nan for fewer than two clusters.
        n: Number of clusters that counted.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference(Interval):
    """The mean difference of two methods on the same records, with its bootstrap interval.

    Attributes:
        p_value: Two-sided bootstrap p-value of "no difference"; nan for fewer than two clusters.
        dropped: Number of records left out because one of the two methods has no value, or nan, for them.
    """

    p_value: float
    dropped: int


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Computes the mean of the cluster means with a percentile bootstrap interval over clusters (Efron 1979).

    The values of a cluster (ConvSent: the cases of one topic) are averaged first, and whole clusters are drawn. With
    fewer than about 20 clusters percentile intervals are too narrow.

    Args:
        values: One number per record, [records]; nan values are left out.
        clusters: Label of each record's cluster, [records]; by default each record is its own.
        level: Coverage, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the random draws; the same input and seed give the same interval.

    Raises:
        ValueError: If values and clusters are not lists of equal length, or level or resamples is out of range.
    """
    means = _cluster_means(values, clusters)
    return _interval(means, _resampled_means(means, resamples, seed), level)


def paired_difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    clusters: Mapping[str, str] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Computes the mean of ``a - b`` over the records that both have, with a bootstrap interval and p-value.

    The p-value is twice the smaller share of bootstrap means on either side of 0, counting the sample itself, so it is
    at least 2 / (resamples + 1); it falls below 1 - level roughly when the interval excludes 0.

    Args:
        a: Record id to score of the first method; a pandas Series indexed by record id serves as well.
        b: Record id to score of the second method.
        clusters: Record id to cluster, for every record that both have; by default each record is its own cluster.
        level: Coverage of the interval, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the random draws.

    Raises:
        KeyError: If a record is missing from ``clusters``.
        ValueError: If level or resamples is out of range.
    """
    a, b = dict(a), dict(b)
    differences = {record: a[record] - b[record] for record in a if record in b}
    differences = {record: value for record, value in differences.items() if not math.isnan(value)}
    labels = [record if clusters is None else clusters[record] for record in differences]
    means = _cluster_means(list(differences.values()), labels)
    draws = _resampled_means(means, resamples, seed)
    interval = _interval(means, draws, level)
    tail = 1 + min((draws <= 0).sum(), (draws >= 0).sum())
    return PairedDifference(
        **vars(interval),
        p_value=min(1.0, 2 * float(tail) / (1 + resamples)) if interval.n > 1 else math.nan,
        dropped=len(a.keys() | b.keys()) - len(differences),
    )


def _cluster_means(values: ArrayLike, clusters: ArrayLike | None) -> NDArray[np.float64]:
    """Computes the mean of each cluster, [clusters], in sorted order of the labels; nan values are left out."""
    values = np.asarray(values, dtype=np.float64)
    labels = np.arange(values.size) if clusters is None else np.asarray(clusters)
    if values.ndim != 1 or labels.shape != values.shape:
        raise ValueError(f"values and clusters: expected two [records], got {values.shape} and {labels.shape}")
    kept = ~np.isnan(values)
    _, group = np.unique(labels[kept], return_inverse=True)
    return np.bincount(group, values[kept]) / np.bincount(group)


def _resampled_means(means: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Computes the means of samples drawn with replacement, [resamples]; nan for fewer than two clusters."""
    n = len(means)
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    if n < 2:
        return np.full(resamples, math.nan)
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // n)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    return np.concatenate([means[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])


def _interval(means: NDArray[np.float64], draws: NDArray[np.float64], level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(means.mean()) if len(means) else math.nan, float(low), float(high), len(means))
