"""Figures of results and of editing areas (the paper's Figure 4), in one style that colour-blind readers can tell apart.

Figures are plain matplotlib objects that no global state holds on to: show them in a notebook, or save them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from instructedit.analysis.tables import METRICS, UNEDITED, in_order

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from instructedit.analysis.areas import EditingAreas

_MARKERS = "os^DvPX*<>"
_GREY = "0.78"
_WIDEST = 14.0  # inches
_CAPTION = {"fontsize": 8, "color": "0.4"}


def metric_bars(summary: pd.DataFrame, titles: Mapping[str, str] | None = None) -> Figure:
    """Bars of every method, grouped by metric: one panel a task, with a panel of its own for fluency, which has another unit.

    Args:
        summary: One row for each ``method``, ``task`` and ``metric`` of ``METRICS`` (others are left out), with ``mean``,
            the interval ``low`` to ``high``, and the number of records ``n``; x 100.
        titles: Task name to the panel's title; its order is the order of the panels, others follow.

    Raises:
        ValueError: If the summary has no mean of these metrics.
    """
    from matplotlib.figure import Figure

    shown = summary[summary["metric"].isin(METRICS) & summary["mean"].notna()]
    if shown.empty:
        raise ValueError(f"nothing to draw: expected means of {', '.join(METRICS)}")
    tasks = in_order(shown["task"], titles or {})
    colours = _method_colours(list(dict.fromkeys(summary["method"])))
    columns = int(shown.groupby("task")["metric"].nunique().max())
    group = min(max(1.0, 0.22 * (len(colours) + 1)), _WIDEST / columns)  # inches
    with _style():
        figure = Figure(figsize=(columns * group + 0.8, 2.1 * len(tasks) + 0.8), layout="constrained")
        grid = figure.add_gridspec(len(tasks), columns)
        for row, task in enumerate(tasks):
            own = shown[shown["task"] == task]
            *shares, fluency = ([name for name in METRICS if name in set(own["metric"])] + [None])[:-1] or [None]
            del shares, fluency
            metrics = in_order(own["metric"], METRICS)
            percent = [name for name in metrics if name != "Fluency"]
            title = f"{(titles or {}).get(task, task)}{_count(own)}"
            if percent:
                axes = figure.add_subplot(grid[row, : len(percent)])
                _bar_panel(axes, own, percent, colours, group)
                axes.set(ylim=(0, 100), ylabel="Score (× 100)")
                axes.set_title(title, loc="left")
            if "Fluency" in metrics:
                axes = figure.add_subplot(grid[row, len(percent)])
                _bar_panel(axes, own, ["Fluency"], colours, group)
                axes.set_title("" if percent else title, loc="left")
    return figure
