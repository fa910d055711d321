"""The contents of a ``grid.yaml``: the rows of an experiment, and how their results are shown."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from instructedit.configs import parsed, read_yaml
from instructedit.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

#: Default sections of an experiment; those without data are left out.
SECTIONS = ("table", "differences", "metrics", "areas", "search", "failures")


@dataclass(frozen=True)
class Row:
    """One line of a grid.

    Attributes:
        editor: Name of its config under configs/editor/; a row with ``of`` uses the other row's editor.
        fit: Whether the editor is trained before it is tested; if not, one seed is enough.
        of: Another row, which is fitted: this row only tests the editor which that row trained, with each of its seeds,
            in another way.
        configs: Further configs of this row, relative to the repository.
        overrides: Further options of this row.
        hidden: Whether the row is not shown, and not run unless another row or the search needs it.
    """

    editor: str | None = None
    fit: bool = True
    of: str | None = None
    configs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    hidden: bool = False

    @property
    def fitted(self) -> bool:
        """True if this row trains its own editor."""
        return self.fit and self.of is None


@dataclass(frozen=True)
class Search:
    """Hyper-parameter search over the options of a row's editor; a trial is one fit, and test records are not used.

    Attributes:
        base: The row whose options are varied.
        parameters: Option (``--model.lr``) to the values to choose from.
        metric: Metric that validation logs; higher is better.
        trials: Number of trials; by default the number of combinations.
        sampler: ``grid`` goes through the combinations, ``tpe`` prefers regions where earlier trials were good.
        pruner: ``median`` stops a trial that is below the median of the others at the same step.
    """

    base: str
    parameters: dict[str, list[Any]]
    metric: str = "val/score"
    trials: int | None = None
    sampler: Literal["grid", "tpe"] = "grid"
    pruner: Literal["median", "none"] = "none"

    @property
    def count(self) -> int:
        """Total number of trials to run."""
        every = prod(map(len, self.parameters.values()))
        return min(self.trials or every, every) if self.sampler == "grid" else self.trials or every


@dataclass(frozen=True)
class Grid:
    """The contents of a ``grid.yaml``, which describes an experiment.

    Attributes:
        title: Title of the experiment.
        seeds: Seeds; every fitted row is run once with each.
        rows: Name in tables to the row.
        configs: Configs of every run, in addition to the scale's, relative to the repository.
        compare: Pairs of a row and a baseline, whose difference is tested.
        layout: Layout of the result table: ``wide``, or ``tall`` for many rows.
        paper: A file of published results beside the grid, ``model,method,task,metric,mean``.
        paper_model: The model whose published results are used; by default the one that the scale names.
        sections: Names of the sections of the results page, in order.
        search: Search over options, which runs before the rows.
        note: The question that the experiment asks, shown at the top of its page.
        options: Name of a section to its options.
    """

    title: str
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    configs: tuple[str, ...] = ()
    compare: tuple[tuple[str, str], ...] = ()
    layout: Literal["wide", "tall"] = "wide"
    paper: str | None = None
    paper_model: str | None = None
    sections: tuple[str, ...] = SECTIONS
    search: Search | None = None
    note: str = ""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Reads and checks a grid file.

        Raises:
            UserError: If it is not YAML, or a key is missing, unknown or of the wrong type, or names an unknown row.
        """
        spec = read_yaml(file)
        if isinstance(spec, dict):
            if "scales" in spec:
                raise UserError(f"{file}: scales: a scale is a file now, configs/scale/NAME.yaml: leave this key out")
            if "views" in spec and "sections" not in spec:
                warnings.warn(f"{file}: views: this key is called sections now", stacklevel=2)
                spec["sections"] = spec.pop("views")
            if isinstance(spec.get("rows"), dict):
                rows = spec["rows"].items()
                spec["rows"] = {name: parsed(Row, part, f"{file}: rows: {name}") for name, part in rows}
            if spec.get("search") is not None:
                spec["search"] = parsed(Search, spec["search"], f"{file}: search")
        grid = parsed(cls, spec, str(file))
        grid._check(str(file))
        return grid

    def _check(self, file: str) -> None:
        if self.paper_model and not self.paper:
            raise UserError(f"{file}: paper_model: needs the key paper, a file")
        named = [("compare", name) for pair in self.compare for name in pair]
        named += [(f"rows: {name}: of", row.of) for name, row in self.rows.items() if row.of is not None]
        named += [("search: base", self.search.base)] if self.search else []
        for where, name in named:
            if name not in self.rows:
                raise UserError(f"{file}: {where}: no row {name!r}; there are: {', '.join(self.rows)}")
        for name, row in self.rows.items():
            if (row.editor is None) == (row.of is None):
                raise UserError(f"{file}: rows: {name}: expected one of the keys editor and of")
            if row.of is not None and not self.rows[row.of].fitted:
                raise UserError(f"{file}: rows: {name}: of: row {row.of!r} is not fitted")
        if self.search:
            self._check_search(file, self.search)

    def _check_search(self, file: str, search: Search) -> None:
        if not self.rows[search.base].fitted:
            raise UserError(f"{file}: search: base: row {search.base!r} is not fitted")
        if not search.parameters:
            raise UserError(f"{file}: search: parameters: nothing to try")
        if search.trials is not None and search.trials < 1:
            raise UserError(f"{file}: search: trials: expected at least 1, got {search.trials}")
        for option, values in search.parameters.items():
            if not option.startswith("--") or "=" in option:
                raise UserError(f"{file}: search: parameters: expected an option such as --model.lr, got {option!r}")
            if not values:
                raise UserError(f"{file}: search: parameters: {option}: no values to choose from")


def published(file: Path, model: str) -> DataFrame:
    """Reads one model's results from a file of published results, without the column ``model``.

    Raises:
        UserError: If there is no such file, column or model.
    """
    import pandas as pd

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    figures = pd.read_csv(file)
    columns = ["model", "method", "task", "metric", "mean"]
    if missing := [name for name in columns if name not in figures]:
        raise UserError(f"{file}: no column {missing[0]!r}")
    if model not in set(figures["model"]):
        raise UserError(f"{file}: no model {model!r}; there are: {', '.join(figures['model'].unique())}")
    return figures.loc[figures["model"] == model, columns[1:]]
