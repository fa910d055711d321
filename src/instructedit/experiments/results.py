"""What an experiment found: the results of its runs, put side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.configs import Scale
    from instructedit.experiments.runner import RunResult
    from instructedit.experiments.spec import Grid


@dataclass(frozen=True)
class Results:
    """What an experiment found.

    Attributes:
        name: Of the experiment.
        grid: Its whole grid.
        scale: The language model and what goes with it.
        rows: Row to its runs, one for each seed; rows that failed or are hidden are not there.
        published: Figures to put beside ours, ``method, task, metric, mean``.
        titles: Task to its name in tables.
        trials: Of the grid's search, where it has one: ``trial``, a column for each option, ``score``, ``state``
            (complete, pruned or failed), ``steps``, ``seconds``, ``run_id``.
    """

    name: str
    grid: Grid
    scale: Scale
    rows: dict[str, list[RunResult]]
    published: DataFrame | None
    titles: dict[str, str]
    trials: DataFrame | None = None

    @cached_property
    def tables(self) -> dict[str, DataFrame]:
        """Row to its probes, those of all seeds, told apart by the column ``seed``."""
        import pandas as pd

        return {
            name: pd.concat([child.table.assign(seed=child.seed) for child in children], ignore_index=True)
            for name, children in self.rows.items()
        }

    @cached_property
    def summary(self) -> DataFrame:
        """``method, task, metric, mean, low, high, n, seeds, spread`` of every row (see `summarise`)."""
        import pandas as pd

        from instructedit.analysis.summary import summarise

        found = [summarise(table, name) for name, table in self.tables.items()]
        columns = ["method", "task", "metric", "mean", "low", "high", "n", "seeds", "spread"]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)

    def titled(self, frame: DataFrame) -> DataFrame:
        """The frame with its tasks as tables name them."""
        return frame.assign(task=frame["task"].map(lambda task: self.titles.get(task, task)))

    def options(self, section: Any) -> dict[str, Any]:
        """What the grid's key ``options`` says for a section."""
        return self.grid.options.get(section.name, {})
