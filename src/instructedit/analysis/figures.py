"""Figures of results and of editing areas (the paper's Figure 4), in one style that colour-blind readers can read.

Figures are plain matplotlib objects that no global state holds on to: show them in a notebook, or save them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from instructedit.analysis.tables import METRICS, UNEDITED, in_order, metric_title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from instructedit.analysis.areas import EditingAreas

_MARKERS = "os^DvPX*<>"
_WIDEST = 14.0  # inches
_SMALL = 6.5  # points, the values above the bars
_SPREAD = (0, 1, 2, 3, 4, 9, 8, 5, 6)  # seaborn's colorblind palette without its grey, the most distinct colours first
_CAPTION: dict[str, Any] = {"fontsize": 8, "color": "0.4"}


def metric_bars(summary: pd.DataFrame, titles: Mapping[str, str] | None = None) -> Figure:
    """Bars of all methods, grouped by metric: one panel a task, and a small one for fluency, which has its own scale.

    Args:
        summary: One row for each ``method``, ``task`` and ``metric``, with ``mean``, the interval from ``low`` to
            ``high`` (x 100), and the number of records ``n``. Metrics other than ``METRICS`` are left out.
        titles: Task name to the panel's title; its order is the order of the panels, others follow.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure

    shown = summary.assign(metric=summary["metric"].str.lower())
    shown = shown[shown["metric"].isin(METRICS) & shown["mean"].notna()]
    if shown.empty:
        raise ValueError(f"nothing to draw: expected means of {', '.join(METRICS)}")
    titles = titles or {}
    tasks = in_order(shown["task"], titles)
    looks = _method_looks(in_order(shown["method"], ()))
    columns = int(shown.groupby("task")["metric"].nunique().max())
    group = min(max(1.0, 0.24 * (len(looks) + 1)), _WIDEST / columns)  # inches that the bars of one metric take
    handles: dict[str, Any] = {}
    with _style():
        figure = Figure(figsize=(columns * group + 1, 2.3 * len(tasks) + 0.9), layout="constrained")
        grid = figure.add_gridspec(len(tasks), columns)
        for row, task in enumerate(tasks):
            own = shown[shown["task"] == task]
            metrics = in_order(own["metric"], METRICS)
            split = len(metrics) - ("fluency" in metrics)
            panels = [span for span in (slice(0, split), slice(split, len(metrics))) if metrics[span]]
            drawn = [figure.add_subplot(grid[row, span]) for span in panels]
            for axes, span in zip(drawn, panels, strict=True):
                handles |= _bar_panel(axes, own, metrics[span], looks, group)
            drawn[0].set_title(titles.get(task, task), loc="left", pad=13)
            drawn[-1].set_title(_count(own), loc="right", pad=13, fontweight="normal", **_CAPTION)
        _legend(figure, {method: handles[method] for method in looks})
        figure.supxlabel("Bars: mean over records. Whiskers: bootstrap interval.", **_CAPTION)
    return figure


def area_map(
    coordinates: NDArray[Any], tasks: Sequence[str], title: str, note: str = "", titles: Mapping[str, str] | None = None
) -> Figure:
    """Scatter of editing areas, one colour and marker a task.

    Args:
        coordinates: The map, [records, 2], as of ``embed``.
        tasks: Task of each record, [records].
        title: What the map shows.
        note: Small print below, such as the method and its perplexity.
        titles: Task name to its name in the legend; its order is the order of the legend, others follow.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(4.4, 4.6), layout="constrained")
        axes = figure.subplots()
        handles = _scatter(axes, coordinates, tasks, _task_styles(tasks, titles))
        axes.set_title(title)
        _legend(figure, handles)
        figure.supxlabel(note, **_CAPTION)
    return figure


def area_maps(
    areas_by_title: Mapping[str, EditingAreas],
    sites: Sequence[str] | None = None,
    method: Literal["tsne", "pca"] = "tsne",
    perplexity: float = 30,
    seed: int = 0,
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Maps of several editors' areas: a row for each editor, a column for each edited matrix.

    Args:
        areas_by_title: What to call an editor, to its areas.
        sites: Names of the edited matrices; by default all of the first editor.
        method: ``"tsne"`` or ``"pca"``, as for ``embed``.
        perplexity: Of t-SNE.
        seed: Of t-SNE.
        titles: Task name to its name in the legend; its order is the order of the legend, others follow.

    Raises:
        UserError: If an editor has no such site.
    """
    from matplotlib.figure import Figure

    from instructedit.analysis.areas import embed

    sites = sites or next(iter(areas_by_title.values())).site_names
    styles = _task_styles([task for areas in areas_by_title.values() for task in areas.tasks], titles)
    handles: dict[str, Any] = {}
    with _style():
        figure = Figure((max(2.3 * len(sites) + 0.4, 4.4), 2.3 * len(areas_by_title) + 1), layout="constrained")
        grid = figure.subplots(len(areas_by_title), len(sites), squeeze=False)
        for row, (editor, areas) in zip(grid, areas_by_title.items(), strict=True):
            row[0].set_ylabel(editor, fontsize=10, fontweight="bold")
            for axes, site in zip(row, sites, strict=True):
                handles |= _scatter(axes, embed(areas, site, method, perplexity, seed), areas.tasks, styles)
        for axes, site in zip(grid[0], sites, strict=True):
            axes.set_title(_short(site))
        _legend(figure, {name: handles[name] for name, *_ in styles.values()})
        figure.supxlabel(_map_note(method, map(len, areas_by_title.values()), perplexity, seed), **_CAPTION)
    return figure


def save_figure(figure: Figure, path_without_suffix: str | Path) -> tuple[Path, Path]:
    """Write a figure as PNG (150 dpi) and SVG, and return both paths; the same figure gives the same bytes."""
    import matplotlib

    png, svg = (Path(f"{path_without_suffix}.{suffix}") for suffix in ("png", "svg"))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "instructedit"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib
    import seaborn as sns

    style: dict[Any, Any] = sns.axes_style("whitegrid") | sns.plotting_context("paper")
    style |= dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "legend.fontsize"), 9)
    style |= {"axes.titlesize": 10, "axes.titleweight": "bold", "axes.edgecolor": "0.6", "grid.color": "0.9"}
    with matplotlib.rc_context(style):
        yield


def _colours(names: Sequence[str]) -> dict[str, Any]:
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    return {name: palette[_SPREAD[i % len(_SPREAD)]] for i, name in enumerate(names)}


def _method_looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The unedited model in grey, the others in colour, hatched once the colours come round again."""
    looks = {UNEDITED: {"color": "0.78"}}
    for i, (method, colour) in enumerate(_colours([name for name in methods if name != UNEDITED]).items()):
        looks[method] = {"color": colour, "hatch": "//" * (i // len(_SPREAD))}
    return {method: looks[method] for method in methods}


def _bar_panel(
    axes: Axes, rows: pd.DataFrame, metrics: Sequence[str], looks: Mapping[str, dict[str, Any]], group: float
) -> dict[str, Any]:
    """Bars of one task, ``group`` inches for each metric, with whiskers from low to high and values above."""
    width = 0.86 / len(looks)
    fitting = 72 * group * width / (0.62 * _SMALL)  # digits above a bar
    handles = {}
    for place, (method, look) in enumerate(looks.items()):
        own = rows[(rows["method"] == method) & rows["metric"].isin(metrics)]
        x = [metrics.index(metric) + (place - (len(looks) - 1) / 2) * width for metric in own["metric"]]
        errors = own[["low", "high"]].sub(own["mean"], axis=0).abs().fillna(0).to_numpy().T
        whiskers = {"lw": 0.8, "ecolor": "0.25"}
        bars = axes.bar(x, own["mean"], 0.92 * width, yerr=errors, label=method, error_kw=whiskers, **look)
        labels = [text if len(text) <= fitting else "" for text in own["mean"].map("{:.0f}".format)]
        axes.bar_label(bars, labels, padding=1.5, fontsize=_SMALL, annotation_clip=False)
        handles[method] = bars
    axes.set(xlim=(-0.5, len(metrics) - 0.5), xticks=range(len(metrics)), xticklabels=map(metric_title, metrics))
    if list(metrics) != ["fluency"]:
        axes.set(ylim=(0, 100), ylabel="Score (× 100)")
    axes.grid(visible=False, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return handles


def _count(rows: pd.DataFrame) -> str:
    low, high = int(rows["n"].min()), int(rows["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _task_styles(tasks: Sequence[str], titles: Mapping[str, str] | None) -> dict[str, tuple[str, Any, str]]:
    """Task to its name, colour and marker; sorted, so that the same tasks look the same in every figure."""
    names = in_order(sorted(set(tasks)), titles or {})
    looks = zip(_colours(names).items(), cycle(_MARKERS), strict=False)
    return {task: ((titles or {}).get(task, task), colour, marker) for (task, colour), marker in looks}


def _scatter(
    axes: Axes, coordinates: NDArray[Any], tasks: Sequence[str], styles: Mapping[str, tuple[str, Any, str]]
) -> dict[str, Any]:
    handles = {}
    size = min(max(4000 / len(tasks), 8), 28)  # points²
    look: dict[str, Any] = {"s": size, "alpha": 0.8, "linewidths": 0.3, "edgecolors": "white"}
    for task, (name, colour, marker) in styles.items():
        points = coordinates[[own == task for own in tasks]]
        if len(points):
            handles[name] = axes.scatter(*points.T, color=colour, marker=marker, label=name, **look)
    axes.set(xticks=[], yticks=[])  # a map's axes have no unit
    return handles


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    inches = sum(0.5 + 0.075 * len(name) for name in handles)
    columns = math.ceil(len(handles) / math.ceil(inches / figure.get_figwidth()))
    look = {"frameon": False, "markerscale": 1.5, "handlelength": 1.3, "columnspacing": 1.6}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, **look)


def _short(site: str) -> str:
    """``transformer.h.45.mlp.c_proj.weight`` as ``block 45 · c_proj``."""
    name = site.removesuffix(".weight")
    block = re.search(r"(?:^|\.)(\d+)\.", name)
    return f"block {block[1]} · {name.rsplit('.', 1)[-1]}" if block else name


def _map_note(method: str, records: Iterable[int], perplexity: float, seed: int) -> str:
    from instructedit.analysis.areas import fitting_perplexity

    if method == "pca":
        return "First two principal components of the normalised updates."
    used = sorted({fitting_perplexity(count, perplexity) for count in records})
    span = " to ".join(f"{value:.3g}" for value in dict.fromkeys((used[0], used[-1])))
    return f"t-SNE, perplexity {span}, seed {seed}. Neighbourhoods count; distances between clusters do not."
