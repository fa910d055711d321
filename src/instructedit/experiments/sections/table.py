"""The main result table, the spread over seeds, and every metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section


class TableSection(Section):
    """Section with tables of the main metrics, of their spread over seeds, and of every metric."""

    name: ClassVar[str] = "table"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields the result tables, or nothing without rows."""
        from instructedit.analysis import html_table, markdown_table, rich_table
        from instructedit.metrics import headline_metrics

        summary, layout = results.summary, results.grid.layout
        if summary.empty:
            return
        arguments = (summary, results.titles, results.published, headline_metrics(), layout)
        yield Panel(
            "table",
            "Results",
            _note(results),
            markdown=markdown_table(*arguments),
            html=html_table(*arguments),
            terminal=rich_table(*arguments),
        )
        main = summary[summary["metric"].isin(headline_metrics()) & summary["spread"].notna()]
        if len(main):
            spread = results.titled(main)
            yield Panel(
                "spread",
                "From seed to seed",
                "Standard deviation of the seeds' means (× 100). It stands beside the intervals above, which are over "
                "records.",
                frame=spread.pivot_table("spread", ["task", "metric"], "method", sort=False).reset_index(),
                folded=True,
            )
        yield Panel(
            "summary",
            "Every metric",
            "Also exact match of the whole answer (.exact), free generation (.generated), prompts without their "
            "instruction (.plain) and the datasets' own groups of probes.",
            frame=summary,
            folded=True,
        )


def _note(results: Results) -> str:
    seeds = int(results.summary["seeds"].max())
    averaged = f", a record's {seeds} seeds averaged first" if seeds > 1 else ""
    note = f"Means × 100 over records{averaged}, with 95 % bootstrap intervals. Best mean bold, next one underlined."
    if results.published is None:
        return note
    return f"{note} paper: published figures for {results.grid.paper_model or results.scale.paper}."
