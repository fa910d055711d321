"""The result table as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section


class MetricsSection(Section):
    """Section with a figure of the metrics: bars for few methods, dots for many."""

    name: ClassVar[str] = "metrics"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields a figure of the metrics, or nothing without rows."""
        from instructedit.analysis import metric_bars, metric_dots

        summary, titles = results.summary, results.titles
        if summary.empty:
            return
        tall = results.grid.layout == "tall"
        figure = metric_dots(summary, titles, results.published) if tall else metric_bars(summary, titles)
        yield Panel("metrics", "Metrics", "The means of the table above with their intervals.", figure=figure)
