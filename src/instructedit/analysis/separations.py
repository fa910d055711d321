"""How far the editing areas of the tasks lie apart (Figure 4): measures over seeds, and maps of each edited matrix."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from instructedit.analysis.seeds import across_seeds
from instructedit.analysis.style import (
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
from instructedit.analysis.tables import in_order

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from instructedit.analysis.areas import EditingAreas

#: The measures of `separation` and their titles in figures.
MEASURES = {
    "silhouette": "Silhouette (cosine)",
    "variance_ratio": "Variance between / within tasks",
    "probe_accuracy": "Accuracy of a linear probe",
}
#: The range of each measure.
_BOUNDS = {"silhouette": (-1.0, 1.0), "variance_ratio": (0.0, math.inf), "probe_accuracy": (0.0, 1.0)}


def separation_table(areas: Mapping[str, Sequence[EditingAreas]], seed: int = 0) -> pd.DataFrame:
    """Computes `separation` for every editor and edited matrix.

    Args:
        areas: Name of an editor to its areas, one item for each seed that it was trained with.
        seed: Seed of the probe's folds.

    Returns:
        ``method, site, measure, mean, low, high, seeds, chance``: means over the seeds with t intervals (see
        `across_seeds`); ``chance`` is the accuracy of a blind probe, nan for the other measures.

    Raises:
        UserError: If an editor's seeds do not have the same edited matrices.
    """
    import pandas as pd

    from instructedit.analysis.areas import separation

    rows = []
    for method, by_seed in areas.items():
        for site in by_seed[0].site_names:
            scores = [separation(own, site, seed) for own in by_seed]
            for measure in MEASURES:
                found = across_seeds((score[measure] for score in scores), bounds=_BOUNDS[measure])
                chance = across_seeds(score["chance"] for score in scores).mean
                blind = chance if measure == "probe_accuracy" else float("nan")
                rows.append((method, site, measure, found.mean, found.low, found.high, found.n, blind))
    return pd.DataFrame(rows, columns=["method", "site", "measure", "mean", "low", "high", "seeds", "chance"])


def separation_dots(table: pd.DataFrame) -> Figure:
    """Draws `separation_table` as dots: a panel for each measure, a line for each matrix, a colour for each editor.

    A dashed line shows the accuracy of a blind probe, the highest one among the editors.
    """
    from matplotlib.figure import Figure

    methods, sites = in_order(table["method"], ()), in_order(table["site"], ())
    colours = colours_of(methods)
    handles: dict[str, Any] = {}
    with styled():
        figure = Figure((9.5, max(0.16 * len(methods) * len(sites), 0.4 * len(sites)) + 1.6), layout="constrained")
        panels = figure.subplots(1, len(MEASURES), sharey=True)
        for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
            own = table[table["measure"] == measure]
            for place, method in enumerate(methods):
                dots = own[own["method"] == method]
                shift = 0.7 * ((place + 0.5) / len(methods) - 0.5)
                y = [sites.index(site) + shift for site in dots["site"]]
                look: dict[str, Any] = {
                    "fmt": "osD^vPX"[place % 7],
                    "ms": 4,
                    "elinewidth": 1.1,
                    "color": colours[method],
                }
                handles[method] = axes.errorbar(dots["mean"], y, xerr=whiskers(dots), **look)
            if own["chance"].notna().any():
                axes.axvline(own["chance"].max(), color="0.4", lw=1, ls="--")
            axes.set(yticks=range(len(sites)), yticklabels=map(short_site, sites), ylim=(len(sites) - 0.5, -0.5))
            axes.set_xlabel(title)
            axes.spines[["top", "right", "left"]].set_visible(False)
        legend(figure, handles)
        note = "Dots: mean over seeds. Whiskers: 95 % t interval over seeds. Dashed: a blind probe."
        caption(figure, note)
    return figure


def map_pairs(
    areas: Mapping[str, EditingAreas],
    site: str,
    perplexity: float = 30,
    seed: int = 0,
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Draws maps of one edited matrix: a column for each editor that edits it, t-SNE above, principal components below.

    Args:
        areas: Name of an editor to its areas.
        site: Name of the edited matrix.
        perplexity: Perplexity of t-SNE.
        seed: Seed of t-SNE.
        titles: Task name to its name in the legend; tasks appear in this order, others follow.

    Raises:
        UserError: If no editor has such a site.
    """
    from matplotlib.figure import Figure

    from instructedit.analysis.areas import embed
    from instructedit.errors import UserError

    shown = {method: own for method, own in areas.items() if site in own.factors}
    if not shown:
        raise UserError(f"no edited matrix named {site} in {', '.join(areas)}")
    methods: tuple[Literal["tsne", "pca"], ...] = ("tsne", "pca")
    styles = task_styles([task for own in shown.values() for task in own.tasks], titles)
    handles: dict[str, Any] = {}
    with styled():
        figure = Figure((max(2.4 * len(shown) + 0.4, 4.4), 6.0), layout="constrained")
        grid = figure.subplots(2, len(shown), squeeze=False)
        for column, (method, own) in enumerate(shown.items()):
            for axes, how in zip(grid[:, column], methods, strict=True):
                handles |= scatter_tasks(axes, embed(own, site, how, perplexity, seed), own.tasks, styles)
            grid[0, column].set_title(textwrap.fill(method, 26))
        grid[0, 0].set_ylabel("t-SNE", fontsize=10, fontweight="bold")
        grid[1, 0].set_ylabel("PCA", fontsize=10, fontweight="bold")
        legend(figure, {name: handles[name] for name, *_ in styles.values()})
        caption(figure, f"{short_site(site)}. {map_note('tsne', map(len, shown.values()), perplexity, seed)}")
    return figure
