"""Separation of the tasks in weight space (Figure 4): measures over seeds, and maps of each edited matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.analysis import EditingAreas
    from instructedit.experiments.runner import RunResult


class SeparationSection(Section):
    """Section with silhouette, variance ratio and linear probe of every row and matrix, and with t-SNE and PCA maps.

    Options: ``perplexity`` of t-SNE (30 by default), and ``seed`` of t-SNE and of the probe's folds (0 by default).
    """

    name: ClassVar[str] = "separation"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields the measures and the maps, or nothing if no row's edits have areas."""
        from instructedit.analysis.separations import map_pairs, separation_dots, separation_table
        from instructedit.analysis.style import short_site
        from instructedit.analysis.tables import in_order

        options: dict[str, Any] = {"perplexity": 30.0, "seed": 0} | results.options(self)
        areas = {name: [own for run in runs if (own := task_areas(run))] for name, runs in results.rows.items()}
        areas = {name: own for name, own in areas.items() if own}
        if not areas:
            return
        table = separation_table(areas, options["seed"])
        note = (
            "Computed on whole editing areas, not on a map. Silhouette: from −1 to 1, above 0 where records are nearer "
            "to their own task than to the next one. Variance: of the tasks' means over that within tasks. Linear "
            "probe: the share of records whose task a logistic regression on 50 principal components names "
            "(cross-validated); the dashed line is what a blind guess reaches. Mean over seeds, with a 95 % t interval."
        )
        yield Panel("separation", "Separation of the tasks", note, figure=separation_dots(table))
        yield Panel("separation-table", "Separation of the tasks, in numbers", frame=readable(table))
        first = {name: own[0] for name, own in areas.items()}
        for i, site in enumerate(in_order((site for own in first.values() for site in own.site_names), ())):
            figure = map_pairs(first, site, titles=results.titles, **options)
            note = "Editing areas of the first seed. The measures above say how much of the picture is there."
            yield Panel(f"map-{i}", f"Editing areas, {short_site(site)}", note, figure=figure)


def readable(table: DataFrame) -> DataFrame:
    """Formats the measures with a line for each row and matrix and a column for each measure: ``0.53 [0.41, 0.66]``."""
    from instructedit.analysis.seeds import interval_text
    from instructedit.analysis.separations import MEASURES
    from instructedit.analysis.style import short_site

    texts = [
        interval_text(*figures, digits=2) for figures in zip(table["mean"], table["low"], table["high"], strict=True)
    ]
    wide = table.assign(text=texts, layer=table["site"].map(short_site)).set_index(
        ["method", "layer", "seeds", "measure"]
    )
    wide = wide["text"].unstack("measure", sort=False)[[*MEASURES]].rename(columns=MEASURES)
    return wide.rename_axis(columns=None).reset_index()


def task_areas(run: RunResult) -> EditingAreas | None:
    """Returns a run's areas with the names of their tasks; the store has titles, which mark held-out tasks."""
    if run.areas is None:
        return None
    names = {title: task for task, title in run.titles.items()}
    return replace(run.areas, tasks=[names.get(title, title) for title in run.areas.tasks])
