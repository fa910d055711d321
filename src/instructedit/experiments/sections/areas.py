"""Maps of editing areas (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section


class AreasSection(Section):
    """Section with t-SNE maps of the editing areas of each row's first seed."""

    name: ClassVar[str] = "areas"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields a figure of the maps, or nothing if no row's edits have areas."""
        from instructedit.analysis import area_maps

        first = {name: runs[0] for name, runs in results.rows.items()}
        areas = {name: run.areas for name, run in first.items() if run.areas is not None}
        if not areas:
            return
        seeds = sorted({first[name].seed for name in areas})
        yield Panel(
            "areas",
            "Editing areas",
            "Where in each edited matrix a record's edit writes: normalised updates, one dot a record, of the editors "
            f"trained with seed {', '.join(map(str, seeds))}.",
            figure=area_maps(areas),
        )
