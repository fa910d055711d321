"""Figure of a bank's metrics by round of its optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instructedit.analysis.style import colours_of, styled
from instructedit.metrics import metric_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def metric_by_round(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws a line for each metric, with the intervals of its means.

    Args:
        rows: Rows of ``round, metric, mean, low, high``, ×100.
        title: Title of the figure.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError("nothing to draw: no rounds")
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    with styled():
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for metric, colour in colours_of(metrics).items():
            own = [row for row in rows if row["metric"] == metric]
            means = [row["mean"] for row in own]
            lengths = [[r["mean"] - r["low"] for r in own], [r["high"] - r["mean"] for r in own]]
            look: dict[str, Any] = {"color": colour, "marker": "o", "ms": 4, "lw": 1.4, "elinewidth": 0.8, "capsize": 2}
            axes.errorbar([row["round"] for row in own], means, lengths, label=metric_title(metric), **look)
        axes.set(xlabel="Round", ylabel="Score (× 100)", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
