"""Size of the edits of each task (Figure 4d): the Frobenius norm of each record's update at each edited matrix.

The norms are those of ΔW = −α ∇̃. The learned rate α is one number for an edited matrix, so it scales all tasks of
a panel alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instructedit.analysis.seeds import across_seeds
from instructedit.analysis.style import caption, legend, short_site, styled, task_styles
from instructedit.analysis.tables import in_order

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from instructedit.analysis.areas import EditingAreas


def magnitudes(areas: Mapping[str, Mapping[int, EditingAreas]]) -> pd.DataFrame:
    """Collects the norm of every update in a table.

    Args:
        areas: Name of an editor to its areas by the seed that it was trained with.

    Returns:
        One row for each update: ``method, seed, site, task, record, norm``.
    """
    import pandas as pd

    parts = [
        pd.DataFrame(
            {"method": method, "seed": seed, "site": site, "task": own.tasks, "record": own.ids, "norm": norms.tolist()}
        )
        for method, by_seed in areas.items()
        for seed, own in by_seed.items()
        for site, norms in own.norms.items()
    ]
    return pd.concat(parts, ignore_index=True)


def magnitude_spread(norms: pd.DataFrame) -> pd.DataFrame:
    """Measures how much the magnitudes of the tasks' edits differ in each edited matrix.

    Args:
        norms: The table of `magnitudes`.

    Returns:
        ``method, site, median, ratio, low, high, seeds``: the median norm over all records, and the ratio of the
        largest task median to the smallest, averaged over seeds with a t interval (see `across_seeds`).
    """
    import pandas as pd

    rows = []
    for (method, site), own in norms.groupby(["method", "site"], sort=False):
        medians = own.groupby(["seed", "task"])["norm"].median().unstack()
        found = across_seeds(medians.max(axis=1) / medians.min(axis=1), bounds=(1.0, math.inf))
        rows.append((method, site, own["norm"].median(), found.mean, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["method", "site", "median", "ratio", "low", "high", "seeds"])


def magnitude_boxes(
    norms: pd.DataFrame, titles: Mapping[str, str] | None = None, sites: Sequence[str] | None = None
) -> Figure:
    """Draws the norms as boxes: a row of panels for each editor, a panel for each edited matrix, a box for each task.

    Boxes run from the first to the third quartile with a line at the median, whiskers from the 5th to the 95th
    percentile; the scale is logarithmic, and the same in all panels. Updates of norm 0 are left out.

    Args:
        norms: The table of `magnitudes`; all seeds are pooled.
        titles: Task name to its name in the legend; boxes appear in this order, others follow.
        sites: The edited matrices to show; all by default.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullFormatter

    methods, sites = in_order(norms["method"], ()), list(sites or in_order(norms["site"], ()))
    styles = task_styles(list(norms["task"]), titles)
    with styled():
        figure = Figure((max(1.6 * len(sites) + 0.8, 4.4), 1.9 * len(methods) + 0.9), layout="constrained")
        grid = figure.subplots(len(methods), len(sites), squeeze=False, sharey=True)
        for panels, method in zip(grid, methods, strict=True):
            panels[0].set_ylabel(method, fontsize=10, fontweight="bold")
            for axes, site in zip(panels, sites, strict=True):
                own = norms[(norms["method"] == method) & (norms["site"] == site) & (norms["norm"] > 0)]
                for place, (task, (_, colour, _)) in enumerate(styles.items()):
                    _box(axes, own.loc[own["task"] == task, "norm"], place, colour)
                axes.set_xticks([])
                axes.set_yscale("log")
                axes.spines[["top", "right"]].set_visible(False)
        for axes, site in zip(grid[0], sites, strict=True):
            axes.set_title(short_site(site).replace(" · ", "\n"))
        grid[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        grid[0, 0].yaxis.set_major_formatter("{x:g}")
        grid[0, 0].yaxis.set_minor_formatter(NullFormatter())
        legend(figure, {name: Patch(color=colour) for name, colour, _ in styles.values()})
        caption(figure, "Frobenius norm of the update. Boxes: quartiles. Whiskers: 5 to 95 %.")
    return figure


def _box(axes: Any, values: pd.Series, place: int, colour: Any) -> None:
    if len(values):
        lines = {"color": "0.25", "linewidth": 0.9}
        axes.boxplot(
            values, positions=[place], widths=0.7, whis=(5, 95), showfliers=False, patch_artist=True,
            boxprops={"facecolor": colour, "edgecolor": "0.25", "linewidth": 0.9}, medianprops=lines,
            whiskerprops=lines, capprops=lines,
        )  # fmt: skip
