"""The comparisons that the grid asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from instructedit.experiments.views.base import Results, Shown, View

if TYPE_CHECKING:
    from pandas import DataFrame


class DifferencesView(View):
    """Pairs of rows, record by record, with p-values corrected for all comparisons of the experiment."""

    name: ClassVar[str] = "differences"

    def show(self, results: Results) -> Iterator[Shown]:
        """Nothing where no pair of the grid was run."""
        import pandas as pd

        from instructedit.analysis.summary import compare, holm

        pairs = [pair for pair in results.grid.compare if all(name in results.tables for name in pair)]
        if not pairs:
            return
        parts = [compare(results.tables[a], results.tables[b], a, b) for a, b in pairs]
        frame = pd.concat(parts, ignore_index=True)
        frame.insert(frame.columns.get_loc("p_value") + 1, "p_holm", holm(frame["p_value"].tolist()))
        yield Shown(
            "differences",
            "Differences",
            "Mean differences × 100 on the same records, with 95 % intervals and two-sided p-values (paired "
            "bootstrap). p (Holm), p_holm in the file, is corrected for all "
            f"{frame['p_value'].notna().sum()} comparisons of this experiment (Holm 1979).",
            frame=results.titled(frame),
            terminal="\n".join(_lines(frame, results.titles)),
        )


def _lines(frame: DataFrame, titles: dict[str, str]) -> Iterator[str]:
    for row in frame.itertuples():
        yield (
            f"{row.method} − {row.baseline}, {titles.get(row.task, row.task)}, {row.metric}: "
            f"{row.mean:+.1f} [{row.low:+.1f}, {row.high:+.1f}], p = {row.p_value:.3f}, corrected {row.p_holm:.3f}"
        )
