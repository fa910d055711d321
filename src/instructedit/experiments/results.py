"""The combined results of an experiment's runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.configs import Scale
    from instructedit.experiments.runner import RunResult
    from instructedit.experiments.spec import Grid


@dataclass(frozen=True)
class Results:
    """The results of an experiment.

    Attributes:
        name: Name of the experiment.
        grid: Its whole grid.
        scale: The language model and the settings that go with it.
        rows: Row to its runs, one for each seed, without rows that failed or were not requested.
        published: Published results to show for comparison, ``method, task, metric, mean``.
        titles: Task to its title in tables.
        trials: Trials of the grid's search, if it has one: ``trial``, a column for each option, ``score``, ``state``
            (complete, pruned or failed), ``steps``, ``seconds``, ``run_id``.
        beside: Method to its probe rows in other experiments, with a column ``seed`` (see `read_scores`).
    """

    name: str
    grid: Grid
    scale: Scale
    rows: dict[str, list[RunResult]]
    published: DataFrame | None
    titles: dict[str, str]
    trials: DataFrame | None = None
    beside: dict[str, DataFrame] = field(default_factory=dict)

    @cached_property
    def tables(self) -> dict[str, DataFrame]:
        """Row, or method beside, to the probe rows of all its seeds, which the column ``seed`` tells apart.

        Rows are in the grid's order, other methods behind them.
        """
        import pandas as pd

        parts: dict[str, list[DataFrame]] = {name: [] for name in [*self.grid.rows, *self.rows, *self.beside]}
        for name, runs in self.rows.items():
            parts[name] += [run.table.assign(seed=run.seed) for run in runs]
        for name, table in self.beside.items():
            parts[name].append(table)
        return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items() if tables}

    @cached_property
    def summary(self) -> DataFrame:
        """Summary of every row: ``method, task, metric, mean, low, high, n, seeds, spread`` (see `summarise`)."""
        import pandas as pd

        from instructedit.analysis.summary import summarise

        found = [summarise(table, name) for name, table in self.tables.items()]
        columns = ["method", "task", "metric", "mean", "low", "high", "n", "seeds", "spread"]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)

    def titled(self, frame: DataFrame) -> DataFrame:
        """Replaces the tasks of a frame by their titles."""
        return frame.assign(task=frame["task"].map(lambda task: self.titles.get(task, task)))

    def options(self, section: Any) -> dict[str, Any]:
        """Returns the options that the grid sets for a section."""
        return self.grid.options.get(section.name, {})
