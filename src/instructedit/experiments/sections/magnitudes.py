"""Size of the edits of each task in each edited matrix (Figure 4d)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section
from instructedit.experiments.sections.separation import task_areas


class MagnitudesSection(Section):
    """Section with box plots of the updates' norms, and a table of how much the tasks' medians differ."""

    name: ClassVar[str] = "magnitudes"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields a figure and a table, or nothing if no row's edits have areas."""
        from instructedit.analysis.magnitudes import magnitude_boxes, magnitude_spread, magnitudes
        from instructedit.analysis.seeds import interval_text
        from instructedit.analysis.style import short_site

        areas = {
            name: {run.seed: own for run in runs if (own := task_areas(run))} for name, runs in results.rows.items()
        }
        areas = {name: own for name, own in areas.items() if own}
        if not areas:
            return
        norms = magnitudes(areas)
        note = "Each record's update ΔW at an edited matrix: its Frobenius norm, records of all seeds together."
        yield Panel("magnitudes", "Size of the edits", note, figure=magnitude_boxes(norms, results.titles))
        spread = magnitude_spread(norms)
        ratios = [interval_text(*own) for own in zip(spread["ratio"], spread["low"], spread["high"], strict=True)]
        frame = spread[["method", "seeds", "median"]].assign(ratio=ratios)
        frame.insert(1, "layer", spread["site"].map(short_site))
        note = (
            "ratio: the largest task's median norm over the smallest one's, 1 where all tasks are edited alike; mean "
            "over seeds with a 95 % t interval. median: over all records."
        )
        yield Panel("magnitudes-table", "Size of the edits, in numbers", note, frame=frame)
