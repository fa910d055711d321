"""The interface of views: what an experiment found → things to look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from instructedit.configs import Scale
    from instructedit.experiments.grid import Grid
    from instructedit.experiments.runs import Child

#: Where views live; a module there with a subclass of `View` is enough to add one.
PACKAGE = "instructedit.experiments.views"


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
    rows: dict[str, list[Child]]
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

    def options(self, view: View) -> dict[str, Any]:
        """What the grid's key ``options`` says for a view."""
        return self.grid.options.get(view.name, {})


@dataclass(frozen=True)
class Shown:
    """One thing to look at: a table or a figure.

    Attributes:
        name: Stem of its files.
        title: Above it.
        note: How to read it, in a sentence or two.
        frame: A table.
        figure: A figure.
        markdown: The table in its own layout, in place of the frame's columns and rows.
        html: The same for the results page, with all text escaped.
        terminal: What the terminal shows of it, a text or a renderable of rich; nothing by default.
        folded: Whether the results page shows it only when asked.
        files: Further files to write beside it, name to text.
    """

    name: str
    title: str
    note: str = ""
    frame: DataFrame | None = None
    figure: Figure | None = None
    markdown: str | None = None
    html: str | None = None
    terminal: Any = None
    folded: bool = False
    files: dict[str, str] = field(default_factory=dict)


class View(ABC):
    """One way to look at results. It yields nothing where the results have not what it shows."""

    #: By which a grid's key ``views`` asks for it.
    name: ClassVar[str] = ""

    @abstractmethod
    def show(self, results: Results) -> Iterator[Shown]:
        """The things to look at, in order."""
