"""Probe rows → the metrics of each task, with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from instructedit.metrics import bootstrap_interval, convsent_edit_success, paired_difference

if TYPE_CHECKING:
    from pandas import DataFrame, Series

#: Metrics that stand in every result table; others carry a suffix (``reliability.exact``, ``.generated``, ``.plain``).
MAIN_METRICS = ("reliability", "generalization", "locality", "portability", "fluency")


def metric_values(table: DataFrame) -> Iterator[tuple[str, str, Series]]:
    """Every metric of every task as one value for each record.

    Yields:
        (task, metric, values 0..1 indexed by (cluster, record)). A record's probes are averaged first. ``.exact`` is
        exact match of the whole answer, ``.generated`` the same under free generation, ``.plain`` asked without an
        instruction, and ``portability.<group>`` and ``locality.<group>`` the dataset's own groups.
    """
    for task, rows in table.groupby("task", sort=False):
        main = rows[rows["main"]]
        for kind in ("reliability", "generalization", "portability"):
            of_kind = rows[rows["kind"] == kind]
            for view, part in (("", of_kind[of_kind["main"]]), (".plain", of_kind[of_kind["view"] == "plain"])):
                for suffix, column in (("", "accuracy"), (".exact", "exact"), (".generated", "generated")):
                    yield from _metric(task, f"{kind}{view}{suffix}", part, column)
        yield from _metric(task, "locality", main[main["kind"] == "locality"], "agreement")
        for kind, column in (("portability", "accuracy"), ("locality", "agreement")):
            for group, part in main[main["kind"] == kind].groupby("group", sort=False):
                if group:
                    yield from _metric(task, f"{kind}.{group}", part, column)
        yield from _metric(task, "fluency", main[main["kind"] == "fluency"], "fluency", scale=0.01)
        yield from _edit_success(task, main)


def _metric(
    task: str, metric: str, rows: DataFrame, column: str, scale: float = 1.0
) -> Iterator[tuple[str, str, Series]]:
    if column in rows and rows[column].notna().any():
        yield task, metric, rows.groupby(["cluster", "record"], sort=False)[column].mean() * scale


def _edit_success(task: str, rows: DataFrame) -> Iterator[tuple[str, str, Series]]:
    """SERAC's edit success on the replies of ConvSent."""
    if not {"wanted", "opposite"} <= set(rows["kind"]):
        return
    keys = ["cluster", "record"]
    wanted = rows[rows["kind"] == "wanted"].groupby(keys, sort=False)
    opposite = rows[rows["kind"] == "opposite"].groupby(keys, sort=False)
    import pandas as pd
    import torch

    means = pd.DataFrame(
        {
            "before": wanted["log_likelihood_before"].mean(),
            "after": wanted["log_likelihood"].mean(),
            "opposite": opposite["log_likelihood"].mean(),
        }
    ).dropna()
    found = convsent_edit_success(*(torch.tensor(means[c].to_numpy()) for c in ("before", "after", "opposite")))
    for name, values in zip(("success", "success.sentiment", "success.topic"), found, strict=True):
        yield task, name, pd.Series(values.numpy(), index=means.index)


def summarise(table: DataFrame, method: str, level: float = 0.95, seed: int = 0) -> DataFrame:
    """Means with bootstrap intervals.

    Args:
        table: Probe rows, as `evaluate` gives them.
        method: What to call the editor.
        level: Of the intervals.
        seed: Of the bootstrap.

    Returns:
        ``method, task, metric, mean, low, high, n``, ×100; n is the number of clusters.
    """
    import pandas as pd

    found = []
    for task, metric, values in metric_values(table):
        clusters = values.index.get_level_values("cluster")
        interval = bootstrap_interval(values.to_numpy(), clusters.to_numpy(), level=level, seed=seed)
        mean, low, high = (100 * x for x in (interval.mean, interval.low, interval.high))
        found.append((method, task, metric, mean, low, high, interval.n))
    return pd.DataFrame(found, columns=["method", "task", "metric", "mean", "low", "high", "n"])


def compare(table: DataFrame, baseline_table: DataFrame, method: str, baseline: str, seed: int = 0) -> DataFrame:
    """Two methods record by record (paired bootstrap), on the metrics of the result table.

    Returns:
        ``method, baseline, task, metric, mean, low, high, p_value, n``: differences method − baseline, ×100.
    """
    import pandas as pd

    ours = {(task, metric): values for task, metric, values in metric_values(table)}
    theirs = {(task, metric): values for task, metric, values in metric_values(baseline_table)}
    found = []
    for task, metric in ours.keys() & theirs.keys():
        if metric not in MAIN_METRICS:
            continue
        a, b = (values.droplevel("cluster") for values in (ours[task, metric], theirs[task, metric]))
        clusters = {record: cluster for cluster, record in ours[task, metric].index}
        gap = paired_difference(a.to_dict(), b.to_dict(), clusters, seed=seed)
        figures = (100 * gap.mean, 100 * gap.low, 100 * gap.high, gap.p_value, gap.n)
        found.append((method, baseline, task, metric, *figures))
    order = {metric: i for i, metric in enumerate(MAIN_METRICS)}
    columns = ["method", "baseline", "task", "metric", "mean", "low", "high", "p_value", "n"]
    frame = pd.DataFrame(sorted(found, key=lambda r: (r[2], order[r[3]])), columns=columns)
    return frame
