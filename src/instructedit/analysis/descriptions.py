"""Effect of the instruction's wording (Figure 3): each description on its own, compared with the seen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instructedit.analysis.style import caption, colours_of, legend, styled, whiskers
from instructedit.analysis.tables import in_order
from instructedit.metrics import headline_metrics, metric_title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The groups of descriptions; the others are tested against the seen ones.
SEEN, HELD_OUT, NOVEL = "seen", "held out", "novel"
GROUPS = (SEEN, HELD_OUT, NOVEL)


def description_spread(summary: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """Measures how far the results of a group's descriptions lie apart.

    Args:
        summary: ``method, task, metric, mean`` of each description, with its name in ``method``.
        groups: Description to its group.

    Returns:
        ``task, metric, group, descriptions, mean, lowest, highest, deviation``: the number of descriptions, then
        statistics of their means; ``deviation`` is the standard deviation, nan for a single description.
    """
    shown = summary[summary["metric"].isin(headline_metrics())].assign(group=lambda frame: frame["method"].map(groups))
    spread = shown.groupby(["task", "metric", "group"], sort=False)["mean"].agg(
        descriptions="count", mean="mean", lowest="min", highest="max", deviation="std"
    )
    return _ordered(spread.reset_index())


def description_tests(
    tables: Mapping[str, pd.DataFrame], groups: Mapping[str, str], resamples: int = 20_000, seed: int = 0
) -> pd.DataFrame:
    """Tests each description that was not seen in training, and each group of them, against the mean of the seen ones.

    Records are paired: a record's value is its mean over seeds, and for a group also over the group's descriptions. The
    bootstrap is over records (ConvSent: topics); p-values are corrected for all tests of the table (Holm 1979).

    Args:
        tables: Description to its probe rows; the column ``seed`` tells the seeds apart.
        groups: Description to its group.
        resamples: Number of bootstrap samples; the default is large so that a corrected p-value can be small.
        seed: Seed of the bootstrap.

    Returns:
        ``description, group, task, metric, mean, low, high, p_value, corrected, n``: differences × 100. A
        whole group has the description ``all <group>``.
    """
    import pandas as pd

    from instructedit.analysis.summary import holm
    from instructedit.metrics import paired_difference

    values = pd.concat({name: _values(table) for name, table in tables.items()}, names=["description"])
    rows = []
    for (task, metric), own in values.groupby(["task", "metric"], sort=False):
        by_record = own.droplevel(["task", "metric"]).unstack("description")
        kind = by_record.columns.map(groups)
        seen = by_record.loc[:, kind == SEEN].mean(axis=1)
        clusters = {record: cluster for cluster, record in by_record.index}
        tested = {name: (groups[name], by_record[name]) for name in by_record if groups[name] != SEEN}
        for group in GROUPS[1:]:
            if (kind == group).sum() > 1:
                tested[f"all {group}"] = group, by_record.loc[:, kind == group].mean(axis=1)
        for name, (group, theirs) in tested.items():
            a, b = (series.droplevel("cluster").to_dict() for series in (theirs, seen))
            gap = paired_difference(a, b, clusters, resamples=resamples, seed=seed)
            figures = (100 * gap.mean, 100 * gap.low, 100 * gap.high, gap.p_value)
            rows.append((name, group, task, metric, *figures, gap.n))
    columns = ["description", "group", "task", "metric", "mean", "low", "high", "p_value", "n"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.insert(columns.index("n"), "corrected", holm(frame["p_value"].tolist()))
    return _ordered(frame)


def description_dots(
    summary: pd.DataFrame, groups: Mapping[str, str], titles: Mapping[str, str] | None = None
) -> Figure:
    """Draws a row of panels for each task, a panel for each metric, and a dot with its interval for each description.

    Args:
        summary: ``method, task, metric, mean, low, high`` of each description, with its name in ``method``.
        groups: Description to its group; groups are drawn side by side, each in its colour with a line at its mean.
        titles: Task name to the title of its panels; tasks appear in this order, others follow.
    """
    from matplotlib.figure import Figure

    shown = summary[summary["metric"].isin(headline_metrics()) & summary["method"].isin(groups)]
    names = sorted(in_order(shown["method"], ()), key=lambda name: GROUPS.index(groups[name]))
    tasks = in_order(shown["task"], titles or {})
    columns = int(shown.groupby("task")["metric"].nunique().max())
    colours = dict(zip(GROUPS, colours_of(GROUPS).values(), strict=True))
    handles: dict[str, Any] = {}
    with styled():
        figure = Figure((2.5 * columns + 0.6, 2.0 * len(tasks) + 0.8), layout="constrained")
        grid = figure.subplots(len(tasks), columns, squeeze=False)
        for panels, task in zip(grid, tasks, strict=True):
            own = shown[shown["task"] == task]
            metrics = in_order(own["metric"], headline_metrics())
            for axes, metric in zip(panels, metrics, strict=False):
                handles |= _panel(axes, own[own["metric"] == metric], names, groups, colours)
                axes.set_ylabel(metric_title(metric))
            for axes in panels[len(metrics) :]:
                axes.set_axis_off()
            panels[0].set_title((titles or {}).get(task, task), loc="left")
        legend(figure, handles)
        note = "A dot for each description: mean over records. Whiskers: bootstrap interval. Lines: mean of the group."
        caption(figure, note)
    return figure


def _panel(
    axes: Axes, rows: pd.DataFrame, names: Sequence[str], groups: Mapping[str, str], colours: Mapping[str, Any]
) -> dict[str, Any]:
    handles = {}
    for marker, (group, colour) in zip("osD", colours.items(), strict=True):
        own = rows[rows["method"].map(groups) == group]
        if len(own):
            x = own["method"].map(names.index)
            look: dict[str, Any] = {"fmt": marker, "ms": 4, "elinewidth": 1.1, "color": colour}
            handles[group] = axes.errorbar(x, own["mean"], yerr=whiskers(own), **look)
            axes.hlines(own["mean"].mean(), x.min() - 0.4, x.max() + 0.4, color=colour, lw=1, alpha=0.6)
    axes.set(xticks=[], xlim=(-0.7, len(names) - 0.3))
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _values(table: pd.DataFrame) -> pd.Series:
    """Returns the value of each record, indexed by ``task, metric, cluster, record``."""
    import pandas as pd

    from instructedit.analysis.summary import metric_values

    shown = headline_metrics()
    found = {(task, metric): values for task, metric, values in metric_values(table) if metric in shown}
    return pd.concat(found, names=["task", "metric"])


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorts the rows of each task by the order of metrics in the result table."""
    order, shown = {task: i for i, task in enumerate(frame["task"].unique())}, headline_metrics()
    places = frame["task"].map(order) * len(shown) + frame["metric"].map(shown.index)
    return frame.iloc[places.argsort(kind="stable")].reset_index(drop=True)
