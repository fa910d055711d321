"""Development of the scores over a long sequence of edits: curves, a table and a figure."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from instructedit.analysis.seeds import interval_text
from instructedit.analysis.style import caption, colours_of, legend, styled
from instructedit.analysis.summary import summarise
from instructedit.analysis.tables import in_order
from instructedit.metrics import editing_metrics, headline_metrics, metric_title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

#: The groups of edits that each point of a curve is a mean over.
GROUPS = {
    "right after": "edits since the last checkpoint, each scored right after itself",
    "all": "all edits so far, scored again",
    "first": "those before the first checkpoint, scored again",
    "last": "those since the last checkpoint, scored again",
}


def sequence_curves(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """Computes the means of all metrics by the number of edits applied to the model.

    Args:
        table: Probe rows with ``position`` (index of the record in the sequence, from 0), ``edits`` (how many records
            the model had been edited with when it was asked) and ``again`` (False right after the record's own edit).
        method: Name of the editor in the curves.

    Returns:
        ``edits, group`` (see `GROUPS`), and the columns of `summarise`.
    """
    import pandas as pd

    found = [
        summarise(rows, method).assign(edits=edits, group=group) for edits, group, rows in _groups(table) if len(rows)
    ]
    columns = ["edits", "group", "method", "task", "metric", "mean", "low", "high", "n"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def _groups(table: pd.DataFrame) -> Iterator[tuple[int, str, pd.DataFrame]]:
    checkpoints = sorted(table.loc[table["again"], "edits"].unique().tolist())
    for before, edits in pairwise([0, *checkpoints]):
        recent = table["position"].between(before, edits, inclusive="left")
        scored_again = table["again"] & (table["edits"] == edits)
        yield edits, "right after", table[~table["again"] & recent]
        yield edits, "all", table[scored_again]
        yield edits, "first", table[scored_again & (table["position"] < checkpoints[0])]
        yield edits, "last", table[scored_again & recent]


def curves_table(curves: pd.DataFrame) -> Table:
    """Builds a table of the headline metrics by the number of edits, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    metrics = in_order(curves["metric"], headline_metrics())
    metrics = [metric for metric in metrics if metric in headline_metrics()]
    table = Table("edits", "task", "scored")
    for metric in metrics:
        table.add_column(metric_title(metric), justify="right", no_wrap=True)
    for (edits, task, group), rows in curves.groupby(["edits", "task", "group"], sort=False):
        means = {row.metric: interval_text(row.mean, row.low, row.high) for row in rows.itertuples()}
        table.add_row(*map(Text, (str(edits), task, group, *(means.get(metric, "–") for metric in metrics))))
    return table


def curves_figure(curves: pd.DataFrame, title: str = "") -> Figure:
    """Draws a row of panels for each task, a panel for each headline metric, and a line for each group of edits.

    Args:
        curves: The table of `sequence_curves`.
        title: Start of the caption, before the explanation of the points.
    """
    from matplotlib.figure import Figure

    tasks = in_order(curves["task"], ())
    colours = colours_of(list(GROUPS))
    rows = {task: curves[curves["task"] == task] for task in tasks}
    panels = {task: [m for m in headline_metrics() if m in set(own["metric"])] for task, own in rows.items()}
    columns = max(map(len, panels.values()))
    handles: dict[str, Any] = {}
    with styled():
        figure = Figure(figsize=(max(2.4 * columns, 4.8) + 0.4, 2.2 * len(tasks) + 1.4), layout="constrained")
        grid = figure.subplots(len(tasks), columns, squeeze=False)
        for axes_row, (task, own) in zip(grid, rows.items(), strict=True):
            for axes, metric in zip(axes_row, panels[task], strict=False):
                handles |= curve_lines(axes, own[own["metric"] == metric], "group", colours, ("all",))
                axes.set(title=metric_title(metric), xlabel="edits")
                if editing_metrics()[metric].is_share:
                    axes.set_ylim(-3, 103)
            for axes in axes_row[len(panels[task]) :]:
                axes.set_axis_off()
            axes_row[0].set_ylabel(task)
        legend(figure, handles)
        heading = f"{title}. " if title else ""
        lines = [f"{heading}Points: means over records (× 100). Band: bootstrap interval of all."]
        lines += [f"{name}: {meaning}" for name, meaning in GROUPS.items()]
        caption(figure, *lines)
    return figure


def curve_lines(
    axes: Axes, rows: pd.DataFrame, by: str, colours: Mapping[str, Any], bands: Container[str]
) -> dict[str, Any]:
    """Draws means by the number of edits, a line for each value of a column; returns the legend's handles.

    Args:
        axes: Where.
        rows: Rows of one metric.
        by: The column.
        colours: The colour of each value.
        bands: Values whose intervals are shown, where there are any.
    """
    handles = {}
    for name, own in rows.groupby(by, sort=False):
        colour = colours[str(name)]
        look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2}
        (handles[str(name)],) = axes.plot(own["edits"], own["mean"], label=name, **look)
        if name in bands and own["low"].notna().all():
            axes.fill_between(own["edits"], own["low"], own["high"], color=colour, alpha=0.15, linewidth=0)
    return {name: handles[name] for name in colours if name in handles}
