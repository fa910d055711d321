"""The result table as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section


class MetricsSection(Section):
    """Bars of few methods, dots of many."""

    name: ClassVar[str] = "metrics"

    def show(self, results: Results) -> Iterator[Panel]:
        """Nothing without rows."""
        from instructedit.analysis import metric_bars, metric_dots

        summary, titles = results.summary, results.titles
        if summary.empty:
            return
        tall = results.grid.layout == "tall"
        figure = metric_dots(summary, titles, results.published) if tall else metric_bars(summary, titles)
        yield Panel("metrics", "Metrics", "The means of the table above with their intervals.", figure=figure)
