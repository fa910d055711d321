"""Comparisons of pairs of rows, as requested by the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Group
    from rich.text import Text


class DifferencesSection(Section):
    """Section that compares pairs of rows record by record, with p-values corrected for all comparisons."""

    name: ClassVar[str] = "differences"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields a table of differences, or nothing if no pair of the grid was run."""
        import pandas as pd

        from instructedit.analysis.summary import compare, holm

        pairs = [pair for pair in results.grid.compare if all(name in results.tables for name in pair)]
        if not pairs:
            return
        parts = [compare(results.tables[a], results.tables[b], a, b) for a, b in pairs]
        frame = pd.concat(parts, ignore_index=True)
        frame.insert(frame.columns.get_loc("p_value") + 1, "p_holm", holm(frame["p_value"].tolist()))
        yield Panel(
            "differences",
            "Differences",
            "Mean differences × 100 on the same records, with 95 % intervals and two-sided p-values (paired "
            "bootstrap). p (Holm), p_holm in the file, is corrected for all "
            f"{frame['p_value'].notna().sum()} comparisons of this experiment (Holm 1979).",
            frame=results.titled(frame),
            terminal=_tables(frame, results.titles),
        )


def _tables(frame: DataFrame, titles: dict[str, str]) -> Group:
    """Builds a table for each pair with tasks down and metrics across; a star marks corrected p-values below 0.05."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from instructedit.analysis.tables import in_order
    from instructedit.metrics import headline_metrics, metric_title

    metrics, tables = in_order(frame["metric"], headline_metrics()), []
    for (method, baseline), pair in frame.groupby(["method", "baseline"], sort=False):
        name = Text(f"{method} − {baseline}  (*: p (Holm) < 0.05)", "bold")
        table = Table(title=name, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column()
        for metric in metrics:
            table.add_column(metric_title(metric), justify="right")
        for task in in_order(pair["task"], titles):
            cells = {row.metric: _cell(row) for row in pair[pair["task"] == task].itertuples()}
            table.add_row(Text(titles.get(task, task)), *(cells.get(metric, Text("– ")) for metric in metrics))
        tables.append(table)
    return Group(*tables)


def _cell(row: Any) -> Text:
    from rich.text import Text

    sure = row.p_holm < 0.05
    text = f"{row.mean:+.1f} [{row.low:+.1f}, {row.high:+.1f}]{'*' if sure else ' '}"
    return Text(text, "bold" if sure else "")
