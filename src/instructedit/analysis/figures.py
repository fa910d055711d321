"""Figures of results and of editing areas (the paper's Figure 4), in one style that colour-blind readers can read.

Figures are plain matplotlib objects without global state: show them in a notebook, or save them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from instructedit.analysis.style import (
    CAPTION,
    SPREAD,
    caption,
    colours_of,
    legend,
    map_note,
    scatter_tasks,
    short_site,
    styled,
    task_styles,
    whiskers,
)
from instructedit.analysis.tables import UNEDITED, in_order
from instructedit.metrics import editing_metrics, headline_metrics, metric_title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from instructedit.analysis.areas import EditingAreas

_WIDEST = 14.0  # inches
_SMALL = 6.5  # points, the values above the bars


def metric_bars(summary: pd.DataFrame, titles: Mapping[str, str] | None = None) -> Figure:
    """Draws bars of all methods by metric: a panel for each task, and a small one for fluency, which has its own scale.

    Args:
        summary: One row for each ``method``, ``task`` and ``metric``, with ``mean``, the interval from ``low`` to
            ``high`` (x 100), and the number of records ``n``. Only the headline metrics are drawn.
        titles: Task name to the panel's title; tasks appear in this order, others follow.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure

    shown = _drawn(summary)
    titles = titles or {}
    tasks = in_order(shown["task"], titles)
    looks = _method_looks(in_order(shown["method"], ()))
    columns = int(shown.groupby("task")["metric"].nunique().max())
    group = min(max(1.0, 0.24 * (len(looks) + 1)), _WIDEST / columns)  # inches that the bars of one metric take
    handles: dict[str, Any] = {}
    with styled():
        figure = Figure(figsize=(columns * group + 1, 2.3 * len(tasks) + 0.9), layout="constrained")
        grid = figure.add_gridspec(len(tasks), columns)
        for row, task in enumerate(tasks):
            own = shown[shown["task"] == task]
            metrics = in_order(own["metric"], headline_metrics())
            panels = _by_unit(metrics)
            ends = accumulate(map(len, panels))
            drawn = [figure.add_subplot(grid[row, end - len(p) : end]) for p, end in zip(panels, ends, strict=True)]
            for axes, panel in zip(drawn, panels, strict=True):
                handles |= _bar_panel(axes, own, panel, looks, group)
            drawn[0].set_title(titles.get(task, task), loc="left", pad=13)
            drawn[-1].set_title(_count(own), loc="right", pad=13, fontweight="normal", **CAPTION)
        legend(figure, {method: handles[method] for method in looks})
        caption(figure, "Bars: mean over records. Whiskers: bootstrap interval.")
    return figure


def metric_dots(
    summary: pd.DataFrame, titles: Mapping[str, str] | None = None, baselines: pd.DataFrame | None = None
) -> Figure:
    """Draws dots of many methods: a line for each method, a row of panels for each task, a panel for each metric.

    Args:
        summary: As for ``metric_bars``.
        titles: Task name to the title of its panels; tasks appear in this order, others follow.
        baselines: Published means, with the columns ``method``, ``task``, ``metric`` and ``mean``, drawn as hollow
            diamonds on the lines of the summary's methods.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure

    shown = _drawn(summary)
    titles = titles or {}
    tasks, methods = in_order(shown["task"], titles), in_order(shown["method"], ())
    columns = int(shown.groupby("task")["metric"].nunique().max())
    published = shown.head(0) if baselines is None else baselines.assign(metric=baselines["metric"].str.lower())
    handles: dict[str, Any] = {}
    with styled():
        height = 0.17 * len(methods) + 0.75
        figure = Figure(figsize=(2.2 * columns + 1.4, height * len(tasks) + 0.7), layout="constrained")
        grid = figure.subplots(len(tasks), columns, squeeze=False)
        for panels, task in zip(grid, tasks, strict=True):
            own, theirs = (rows[rows["task"] == task] for rows in (shown, published))
            metrics = in_order(own["metric"], headline_metrics())
            for axes, metric in zip(panels, metrics, strict=False):
                handles |= _dot_panel(axes, own[own["metric"] == metric], theirs[theirs["metric"] == metric], methods)
                axes.set_xlabel(metric_title(metric))
            for axes in panels[1:]:
                axes.tick_params(labelleft=False)
            for axes in panels[len(metrics) :]:
                axes.set_axis_off()
            panels[0].set_title(titles.get(task, task), loc="left")
            panels[len(metrics) - 1].set_title(_count(own), loc="right", fontweight="normal", **CAPTION)
        if len(handles) > 1:
            legend(figure, handles)
        caption(figure, "Dots: mean over records (× 100). Whiskers: bootstrap interval.")
    return figure


def area_map(
    coordinates: NDArray[Any], tasks: Sequence[str], title: str, note: str = "", titles: Mapping[str, str] | None = None
) -> Figure:
    """Draws a scatter plot of editing areas, with one colour and marker for each task.

    Args:
        coordinates: The map, [records, 2], as ``embed`` returns it.
        tasks: Task of each record, [records].
        title: What the map shows.
        note: Caption, such as the method and its perplexity.
        titles: Task name to its name in the legend; tasks appear in this order, others follow.
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(4.4, 4.6), layout="constrained")
        axes = figure.subplots()
        handles = scatter_tasks(axes, coordinates, tasks, task_styles(tasks, titles))
        axes.set_title(title)
        legend(figure, handles)
        caption(figure, note)
    return figure


def area_maps(
    areas_by_title: Mapping[str, EditingAreas],
    sites: Sequence[str] | None = None,
    method: Literal["tsne", "pca"] = "tsne",
    perplexity: float = 30,
    seed: int = 0,
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Draws maps of several editors' areas: a row for each editor, with a map for each edited matrix.

    Args:
        areas_by_title: Name of an editor to its areas.
        sites: Names of the edited matrices; by default all that an editor has.
        method: ``"tsne"`` or ``"pca"``, as for ``embed``.
        perplexity: Perplexity of t-SNE.
        seed: Seed of t-SNE.
        titles: Task name to its name in the legend; tasks appear in this order, others follow.

    Raises:
        UserError: If an editor has no such site.
    """
    from matplotlib.figure import Figure

    from instructedit.analysis.areas import embed

    rows = {editor: list(sites or areas.site_names) for editor, areas in areas_by_title.items()}
    columns = max(map(len, rows.values()))
    styles = task_styles([task for areas in areas_by_title.values() for task in areas.tasks], titles)
    handles: dict[str, Any] = {}
    with styled():
        figure = Figure((max(2.3 * columns + 0.4, 4.4), 2.3 * len(rows) + 1), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        above: list[str] = []
        for panels, (editor, own) in zip(grid, rows.items(), strict=True):
            areas = areas_by_title[editor]
            panels[0].set_ylabel(editor, fontsize=10, fontweight="bold")
            for axes, site in zip(panels, own, strict=False):
                handles |= scatter_tasks(axes, embed(areas, site, method, perplexity, seed), areas.tasks, styles)
                if own != above:
                    axes.set_title(short_site(site))
            for axes in panels[len(own) :]:
                axes.set_axis_off()
            above = own
        legend(figure, {name: handles[name] for name, *_ in styles.values()})
        caption(figure, map_note(method, map(len, areas_by_title.values()), perplexity, seed))
    return figure


def parameter_effects(trials: pd.DataFrame, parameters: Sequence[str], metric: str) -> Figure:
    """Draws the effect of each searched option: a panel for each, a dot for each trial, a line through the means.

    Args:
        trials: One row for each trial, with a column for each option, ``score`` and ``state``; a trial whose state is
            not ``complete`` is drawn hollow and left out of the means.
        parameters: The options.
        metric: Name of the score, for the axis.

    Raises:
        ValueError: If no trial has a score.
    """
    from matplotlib.figure import Figure

    shown = trials[trials["score"].notna()]
    if shown.empty:
        raise ValueError("nothing to draw: no trial has a score")
    blue, orange = colours_of(["trials", "mean"]).values()
    whole = shown["state"] == "complete"
    with styled():
        figure = Figure(figsize=(max(2.6 * len(parameters) + 0.6, 4.4), 3.1), layout="constrained")
        handles: dict[str, Any] = {}
        panels = figure.subplots(1, len(parameters), sharey=True, squeeze=False)[0]
        for axes, option in zip(panels, parameters, strict=True):
            values = in_order(trials[option].map(str), map(str, sorted(trials[option].unique(), key=_by_size)))
            places = shown[option].map(str).map(values.index)
            look: dict[str, Any] = {"s": 26, "linewidths": 1.1, "edgecolors": [blue], "zorder": 3}
            handles["trial"] = axes.scatter(places[whole], shown["score"][whole], facecolors=[blue], **look)
            if not whole.all():
                drawn = axes.scatter(places[~whole], shown["score"][~whole], facecolors="none", **look)
                handles["stopped early"] = drawn
            means = shown["score"][whole].groupby(places[whole]).mean()
            handles["mean"] = axes.plot(means.index, means, color=orange, lw=1.4)[0]
            axes.set(xlim=(-0.4, len(values) - 0.6), xticks=range(len(values)), xticklabels=values, xlabel=option)
            axes.spines[["top", "right", "left"]].set_visible(False)
        figure.axes[0].set_ylabel(metric)
        legend(figure, handles)
    return figure


def _by_size(value: Any) -> tuple[bool, float, str]:
    """Returns a sort key that puts numbers first by size, then other values by name."""
    number = isinstance(value, int | float) or hasattr(value, "__float__")
    return (not number, float(value) if number else 0.0, str(value))


def many_edits_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draws the cost of an edit against the number of edits; the line is flat if earlier edits do not add to it.

    Args:
        rows: ``edits``, ``ms_per_edit`` and ``memory_mb`` (peak above the start) of each run.
    """
    from matplotlib.figure import Figure

    panels = {"ms_per_edit": "time of an edit (ms)", "memory_mb": "peak memory (MB)"}
    with styled():
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        counts = [row["edits"] for row in rows]
        for axes, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            values = [row[key] for row in rows]
            axes.plot(counts, values, marker="o")
            for count, value in zip(counts, values, strict=True):
                axes.annotate(f"{value:.0f}", (count, value), (0, 6), textcoords="offset points", ha="center")
            axes.set(xscale="log", xlabel="edits", ylabel=label, ylim=(0, 1.25 * max(values)))
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def edit_rate_curve(sweep: pd.DataFrame, chosen: float) -> Figure:
    """Draws the untrained editor's outer loss and its two parts by edit rate, and marks the chosen rate.

    Args:
        sweep: One row for each rate, with ``rate``, ``loss``, ``edit_loss`` and ``locality_loss``; rate 0 is the
            unedited model, drawn as a horizontal line.
        chosen: The rate that training starts at.
    """
    from matplotlib.figure import Figure

    tried, unedited = sweep[sweep["rate"] > 0], sweep[sweep["rate"] == 0]["loss"]
    lines = {"loss": "outer loss", "edit_loss": "edit loss", "locality_loss": "locality loss (KL)"}
    looks = zip(lines, colours_of([*lines]).values(), ("o-", ".--", ".:"), strict=True)
    with styled():
        figure = Figure(figsize=(4.6, 3.3), layout="constrained")
        axes = figure.subplots()
        handles: dict[str, Any] = {}
        for column, colour, style in looks:
            handles[lines[column]] = axes.plot(tried["rate"], tried[column], style, color=colour)[0]
        for value in unedited:
            handles["unedited"] = axes.axhline(value, color="0.55", lw=1)
        axes.axvline(chosen, color="0.3", lw=1, ls="--")
        axes.set(xscale="log", xlabel=f"edit rate (chosen: {chosen:.2g})", ylabel="loss (nats)")
        axes.set(ylim=(0, 1.5 * max([*unedited, tried["loss"].min()])))
        axes.spines[["top", "right"]].set_visible(False)
        legend(figure, handles)
    return figure


def _method_looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the look of each method: grey if unedited, else coloured, and hatched once the colours repeat."""
    looks = {UNEDITED: {"color": "0.78"}}
    for i, (method, colour) in enumerate(colours_of([name for name in methods if name != UNEDITED]).items()):
        looks[method] = {"color": colour, "hatch": "//" * (i // len(SPREAD))}
    return {method: looks[method] for method in methods}


def _bar_panel(
    axes: Axes, rows: pd.DataFrame, metrics: Sequence[str], looks: Mapping[str, dict[str, Any]], group: float
) -> dict[str, Any]:
    """Draws the bars of one task, ``group`` inches for each metric, with whiskers from low to high and values above."""
    width = 0.86 / len(looks)
    fitting = 72 * group * width / (0.62 * _SMALL)  # digits above a bar
    handles = {}
    for place, (method, look) in enumerate(looks.items()):
        own = rows[(rows["method"] == method) & rows["metric"].isin(metrics)]
        x = [metrics.index(metric) + (place - (len(looks) - 1) / 2) * width for metric in own["metric"]]
        thin = {"lw": 0.8, "ecolor": "0.25"}
        bars = axes.bar(x, own["mean"], 0.92 * width, yerr=whiskers(own), label=method, error_kw=thin, **look)
        labels = [text if len(text) <= fitting else "" for text in own["mean"].map("{:.0f}".format)]
        axes.bar_label(bars, labels, padding=1.5, fontsize=_SMALL, annotation_clip=False)
        handles[method] = bars
    axes.set(xlim=(-0.5, len(metrics) - 0.5), xticks=range(len(metrics)), xticklabels=map(metric_title, metrics))
    if _is_share(metrics[0]):
        axes.set(ylim=(0, 100), ylabel="Score (× 100)")
    axes.grid(visible=False, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return handles


def _dot_panel(axes: Axes, rows: pd.DataFrame, published: pd.DataFrame, methods: Sequence[str]) -> dict[str, Any]:
    """Draws the means of one task and metric, first method at the top, with whiskers from low to high."""
    blue, orange = colours_of(["measured", "paper"]).values()
    places = {method: place for place, method in enumerate(methods)}
    handles: dict[str, Any] = {}
    unedited = rows["method"] == UNEDITED
    for own, colour in ((rows[unedited], "0.55"), (rows[~unedited], blue)):
        look: dict[str, Any] = {"fmt": "o", "ms": 4, "elinewidth": 1.2, "color": colour}
        drawn = axes.errorbar(own["mean"], own["method"].map(places), xerr=whiskers(own), **look)
        handles["measured"] = drawn  # the legend shows the last colour
    published = published[published["method"].isin(places)]
    if len(published):
        look = {"marker": "D", "s": 18, "facecolors": "none", "edgecolors": [orange], "linewidths": 1.1, "zorder": 3}
        handles["paper"] = axes.scatter(published["mean"], published["method"].map(places), **look)
    axes.set(ylim=(len(methods) - 0.5, -0.5), yticks=range(len(methods)), yticklabels=methods)
    if rows["metric"].map(_is_share).all():
        axes.set(xlim=(-3, 103))
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return handles


def _is_share(metric: str) -> bool:
    return editing_metrics()[metric].is_share


def _by_unit(metrics: Sequence[str]) -> list[list[str]]:
    """Groups the metrics that are shares, which have a common axis; every other metric is on its own."""
    shares = [metric for metric in metrics if _is_share(metric)]
    return [part for part in (shares, *([metric] for metric in metrics if metric not in shares)) if part]


def _drawn(summary: pd.DataFrame) -> pd.DataFrame:
    """Selects the rows that a figure shows, with metrics in lower case."""
    shown = summary.assign(metric=summary["metric"].str.lower())
    shown = shown[shown["metric"].isin(headline_metrics()) & shown["mean"].notna()]
    if shown.empty:
        raise ValueError(f"nothing to draw: expected means of {', '.join(headline_metrics())}")
    return shown


def _count(rows: pd.DataFrame) -> str:
    low, high = int(rows["n"].min()), int(rows["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"
