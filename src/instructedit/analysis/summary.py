"""Summaries of probe rows: the metrics of each task, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from instructedit.metrics import bootstrap_interval, editing_metrics, headline_metrics, paired_difference

if TYPE_CHECKING:
    from pandas import DataFrame, Series

#: Enough samples for p-values that stay significant when corrected for some hundred comparisons.
_RESAMPLES = 20_000


def metric_values(table: DataFrame) -> Iterator[tuple[str, str, Series]]:
    """Yields every metric of every task as one value for each record.

    With a column ``seed``, a record is scored under each seed separately and its scores are averaged: one value,
    however many seeds there are.

    Yields:
        (task, metric, values 0..1 indexed by (cluster, record)). A record's probes are averaged first. ``.exact`` means
        an exact match of the whole answer, ``.generated`` a right answer under free generation, ``.plain`` prompts
        without an instruction, and ``portability.<group>`` and ``locality.<group>`` the dataset's own groups.
    """
    if "seed" not in table:
        yield from _metrics(table)
        return
    import pandas as pd

    found: dict[tuple[str, str], list[Series]] = {}
    for _, part in table.groupby("seed", sort=False):
        for task, metric, values in _metrics(part):
            found.setdefault((task, metric), []).append(values)
    for (task, metric), parts in found.items():
        yield task, metric, pd.concat(parts).groupby(level=["cluster", "record"], sort=False).mean()


def _metrics(table: DataFrame) -> Iterator[tuple[str, str, Series]]:
    for task, rows in table.groupby("task", sort=False):
        for metric in editing_metrics().values():
            for name, values in metric.values(rows):
                yield task, name, values


def summarise(table: DataFrame, method: str, level: float = 0.95, seed: int = 0) -> DataFrame:
    """Computes the mean of each metric with a bootstrap interval.

    The intervals are over records (clusters), after averaging over seeds; ``spread`` tells how far the seeds lie apart.

    Args:
        table: Probe rows, as in `Scores.table`; those of several runs with a column ``seed``.
        method: Name of the editor in the summary.
        level: Coverage of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        ``method, task, metric, mean, low, high, n``, ×100; n is the number of clusters. With a column ``seed`` also
        ``seeds``, their number, and ``spread``, the standard deviation of their means (ddof 1; nan for one seed).
    """
    import pandas as pd

    found = []
    for task, metric, values in metric_values(table):
        clusters = values.index.get_level_values("cluster")
        interval = bootstrap_interval(values.to_numpy(), clusters.to_numpy(), level=level, seed=seed)
        mean, low, high = (100 * x for x in (interval.mean, interval.low, interval.high))
        found.append((method, task, metric, mean, low, high, interval.n))
    summary = pd.DataFrame(found, columns=["method", "task", "metric", "mean", "low", "high", "n"])
    return summary.merge(_spread(table), how="left", on=["task", "metric"]) if "seed" in table else summary


def _spread(table: DataFrame) -> DataFrame:
    """Returns ``task, metric, seeds, spread``: the number of seeds and the standard deviation of their means, ×100."""
    import pandas as pd

    means = [
        (task, metric, 100 * values.groupby(level="cluster").mean().mean())
        for _, part in table.groupby("seed", sort=False)
        for task, metric, values in _metrics(part)
    ]
    grouped = pd.DataFrame(means, columns=["task", "metric", "mean"]).groupby(["task", "metric"], sort=False)["mean"]
    return grouped.agg(seeds="count", spread="std").reset_index()


def compare(table: DataFrame, baseline_table: DataFrame, method: str, baseline: str, seed: int = 0) -> DataFrame:
    """Compares two methods record by record (paired bootstrap) on the metrics of the result table.

    Returns:
        ``method, baseline, task, metric, mean, low, high, p_value, n``: differences method − baseline, ×100.
    """
    import pandas as pd

    ours = {(task, metric): values for task, metric, values in metric_values(table)}
    theirs = {(task, metric): values for task, metric, values in metric_values(baseline_table)}
    order = {metric: i for i, metric in enumerate(headline_metrics())}
    found = []
    for task, metric in ours.keys() & theirs.keys():
        if metric not in order:
            continue
        a, b = (values.droplevel("cluster") for values in (ours[task, metric], theirs[task, metric]))
        clusters = {record: cluster for cluster, record in ours[task, metric].index}
        gap = paired_difference(a.to_dict(), b.to_dict(), clusters, resamples=_RESAMPLES, seed=seed)
        figures = (100 * gap.mean, 100 * gap.low, 100 * gap.high, gap.p_value, gap.n)
        found.append((method, baseline, task, metric, *figures))
    columns = ["method", "baseline", "task", "metric", "mean", "low", "high", "p_value", "n"]
    frame = pd.DataFrame(sorted(found, key=lambda r: (r[2], order[r[3]])), columns=columns)
    return frame


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for multiple comparisons (Holm 1979); nan values are not counted and stay nan."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, largest = list(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
