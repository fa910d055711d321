"""The shared style of all figures: colours that colour-blind readers can tell apart, legends, names of matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from instructedit.analysis.tables import in_order

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_MARKERS = "os^DvPX*<>"
SPREAD = (0, 1, 2, 3, 4, 9, 8, 5, 6)  # seaborn's colorblind palette without its grey, the most distinct colours first
CAPTION: dict[str, Any] = {"fontsize": 8, "color": "0.4"}
#: Letters of a caption that surely fit into an inch.
_LETTERS = 14


@contextmanager
def styled() -> Iterator[None]:
    """Gives figures that are made within the context the project's style."""
    import matplotlib
    import seaborn as sns

    style: dict[Any, Any] = sns.axes_style("whitegrid") | sns.plotting_context("paper")
    style |= dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "legend.fontsize"), 9)
    style |= {"axes.titlesize": 10, "axes.titleweight": "bold", "axes.edgecolor": "0.6", "grid.color": "0.9"}
    with matplotlib.rc_context(style):
        yield


def colours_of(names: Sequence[str]) -> dict[str, Any]:
    """Assigns a colour to each name, the most distinct ones first."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    return {name: palette[SPREAD[i % len(SPREAD)]] for i, name in enumerate(names)}


def whiskers(rows: pd.DataFrame) -> NDArray[Any]:
    """Returns the lengths of the whiskers below and above the means, [2, rows]; 0 where there is no interval."""
    lengths: NDArray[Any] = rows[["low", "high"]].sub(rows["mean"], axis=0).abs().fillna(0).to_numpy().T
    return lengths


def task_styles(tasks: Sequence[str], titles: Mapping[str, str] | None) -> dict[str, tuple[str, Any, str]]:
    """Maps each task to its name, colour and marker; sorted, so that the same tasks look the same in every figure."""
    names = in_order(sorted(set(tasks)), titles or {})
    looks = zip(colours_of(names).items(), cycle(_MARKERS), strict=False)
    return {task: ((titles or {}).get(task, task), colour, marker) for (task, colour), marker in looks}


def scatter_tasks(
    axes: Axes, coordinates: NDArray[Any], tasks: Sequence[str], styles: Mapping[str, tuple[str, Any, str]]
) -> dict[str, Any]:
    """Draws the dots of a map in each task's colour and marker, and returns the legend's handles."""
    handles = {}
    size = min(max(4000 / len(tasks), 8), 28)  # points²
    look: dict[str, Any] = {"s": size, "alpha": 0.8, "linewidths": 0.3, "edgecolors": "white"}
    for task, (name, colour, marker) in styles.items():
        points = coordinates[[own == task for own in tasks]]
        if len(points):
            handles[name] = axes.scatter(*points.T, color=colour, marker=marker, label=name, **look)
    axes.set(xticks=[], yticks=[])  # a map's axes have no unit
    return handles


def legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Adds a legend above the panels, in as many lines as the figure's width requires."""
    inches = sum(0.5 + 0.075 * len(name) for name in handles)
    columns = math.ceil(len(handles) / math.ceil(inches / figure.get_figwidth()))
    look = {"frameon": False, "markerscale": 1.5, "handlelength": 1.3, "columnspacing": 1.6}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, **look)


def short_site(site: str) -> str:
    """Shortens the name of a matrix: ``transformer.h.45.mlp.c_proj.weight`` becomes ``block 45 · c_proj``."""
    name = site.removesuffix(".weight")
    block = re.search(r"(?:^|\.)(\d+)\.", name)
    return f"block {block[1]} · {name.rsplit('.', 1)[-1]}" if block else name


def map_note(method: str, records: Iterable[int], perplexity: float, seed: int) -> str:
    """Describes how a map was made, for its caption."""
    from instructedit.analysis.areas import fitting_perplexity

    if method == "pca":
        return "First two principal components of the normalised updates."
    used = sorted({fitting_perplexity(count, perplexity) for count in records})
    span = " to ".join(f"{value:.3g}" for value in dict.fromkeys((used[0], used[-1])))
    return f"t-SNE, perplexity {span}, seed {seed}. Neighbourhoods count; distances between clusters do not."


def caption(figure: Figure, *lines: str) -> None:
    """Writes what a figure shows below it; lines wider than the figure are broken, after a sentence if that will do."""
    width = int(_LETTERS * figure.get_figwidth())
    broken: list[str] = []
    for line in lines:
        narrow = len(line) > width
        broken += [part for text in (re.split(r"(?<=[.;]) ", line) if narrow else [line]) for part in wrap(text, width)]
    figure.supxlabel("\n".join(broken), **CAPTION)
