"""The plan of an experiment: the rows and seeds of a grid at one scale, with their command lines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from instructedit import paths
from instructedit.configs import Scale, located
from instructedit.errors import UserError, unknown
from instructedit.experiments.fingerprint import fingerprint
from instructedit.experiments.scores import read_scores
from instructedit.experiments.spec import Grid, published

if TYPE_CHECKING:
    from pandas import DataFrame

#: Folder of the MLflow store unless another is named.
ROOT = "mlruns"


@dataclass(frozen=True)
class Plan:
    """A grid at one scale (see `load`), which `Experiment` runs.

    Attributes:
        name: Name of its folder under experiments/.
        grid: The whole grid.
        scale: The language model and the settings that go with it.
        rows: Names of the rows to run.
        seeds: The seeds to run them with.
        published: Published results to show for comparison, ``method, task, metric, mean``.
        root: Folder of the MLflow store.
        out: Folder of the results page, tables and figures.
        overrides: Further options of every run.
        force: Whether to repeat runs that are already in the store.
        data: Name of a config under configs/data/ that says where the records are; None leaves that to the scale.
        beside: Files with scores of other experiments (see `read_scores`), to be shown with these.
    """

    name: str
    grid: Grid
    scale: Scale
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    published: DataFrame | None
    root: Path
    out: Path
    overrides: tuple[str, ...] = ()
    force: bool = False
    data: str | None = None
    beside: tuple[Path, ...] = ()

    @classmethod
    def load(
        cls,
        name: str,
        scale: str = "tiny",
        seeds: list[int] | None = None,
        rows: list[str] | None = None,
        root: str = ROOT,
        out: str | None = None,
        overrides: list[str] | None = None,
        force: bool = False,
        data: str | None = None,
        beside: list[str] | None = None,
    ) -> Self:
        """Reads ``experiments/<name>/grid.yaml``.

        Raises:
            UserError: If there is no such experiment, scale, row, config, published result or file of scores, the grid
                is invalid, or a row is to be run with a seed whose scores are given.
        """
        file = _grid_file(name)
        if not file.is_file():
            known = (paths.SHARED / "experiments").glob("*/grid.yaml")
            raise unknown("experiment", name, sorted(each.parent.name for each in known))
        grid, at = Grid.load(file), Scale.load(scale)
        if strange := sorted(set(rows or ()) - set(grid.rows)):
            raise UserError(f"{file}: {unknown('row', strange[0], list(grid.rows))}")
        model = grid.paper_model or at.paper
        figures = published(file.parent / grid.paper, model) if grid.paper and model else None
        chosen = rows if rows is not None else [key for key, row in grid.rows.items() if not row.hidden]
        folder = Path(out).expanduser() if out else _outputs(name, at.name, data)
        experiment = cls(
            name, grid, at, tuple(chosen), tuple(seeds or grid.seeds), figures, Path(root).expanduser(), folder,
            tuple(located(overrides or ())), force, data, tuple(Path(each).expanduser() for each in beside or ()),
        )  # fmt: skip
        for key in grid.rows:
            experiment.configs(key)  # reports a missing file now, not after hours
        experiment._check_beside()
        return experiment

    @cached_property
    def tables_beside(self) -> dict[str, DataFrame]:
        """Method to its probe rows in the files of `beside`, read before anything runs (see `read_scores`)."""
        return read_scores(self.beside)

    def _check_beside(self) -> None:
        tables = self.tables_beside
        if not (self.rows or tables or self.grid.search):
            raise UserError("--rows: none given, and neither scores of other experiments (--beside) nor a search")
        for name in self.rows:
            given = set(tables[name]["seed"]) if name in tables else set()
            if twice := sorted(given.intersection(self.seeds_of(name))):
                raise UserError(f"--beside: {name}, seed {twice[0]}, is to be run here too; leave it out of --seeds")

    @property
    def file(self) -> Path:
        """Path of the grid's file."""
        return _grid_file(self.name)

    @property
    def command(self) -> str:
        """The command line that runs this experiment."""
        parts = ["instructedit", "experiment", self.name, "--scale", self.scale.option]
        parts += ["--seeds", json.dumps(self.seeds)]
        parts += ["--data", self.data] if self.data else []
        if self.rows != tuple(key for key, row in self.grid.rows.items() if not row.hidden):
            parts += ["--rows", json.dumps(self.rows, ensure_ascii=False)]
        parts += ["--root", str(self.root)] if self.root != Path(ROOT) else []
        parts += ["--out", str(self.out)] if self.out != _outputs(self.name, self.scale.name, self.data) else []
        parts += ["--beside", json.dumps([*map(str, self.beside)], ensure_ascii=False)] if self.beside else []
        parts += ["--overrides", json.dumps(self.overrides, ensure_ascii=False)] if self.overrides else []
        return shlex.join([*parts, *(["--force"] if self.force else [])])

    def configs(self, name: str) -> list[Path]:
        """Returns the config files of a row; for a row with ``of``, those of the other row come first.

        Raises:
            UserError: If its editor has no config, or one of its own configs does not exist.
        """
        row, own = self.grid.rows[name], self._own_configs(name)
        return [*(self.configs(row.of) if row.of else self._shared_configs(name)), *own]

    def _shared_configs(self, name: str) -> list[Path]:
        data = [f"configs/data/{self.data}.yaml"] if self.data else []
        try:
            return self.scale.files(self.grid.rows[name].editor, _shipped((*self.grid.configs, *data)))
        except UserError as error:
            raise UserError(f"row {name!r}: {error}") from error

    def _own_configs(self, name: str) -> list[Path]:
        try:
            return _shipped(self.grid.rows[name].configs)
        except UserError as error:
            raise UserError(f"row {name!r}: {error}") from error

    def arguments(self, name: str, seed: int) -> list[str]:
        """Returns the command line of a row, without the options for the store and the checkpoint to test."""
        command = "fit" if self.grid.rows[name].fitted else "test"
        seeded = (f"--seed_everything={seed}", f"--data.seed={seed}")
        return [
            command, *seeded, "--results.show=false", *self._options(name), f"--results.method={name}", *self.overrides
        ]  # fmt: skip

    def _options(self, name: str) -> list[str]:
        """Returns configs and overrides; for a row with ``of``, its own come after all of the other row's."""
        row = self.grid.rows[name]
        first = self._options(row.of) if row.of else [f"--config={path}" for path in self._shared_configs(name)]
        return [*first, *(f"--config={path}" for path in self._own_configs(name)), *row.overrides]

    def fingerprint(self, name: str, seed: int) -> str:
        """Computes the fingerprint of one run of a row; for a row with ``of``, it includes the other row's."""
        of = self.grid.rows[name].of
        return fingerprint([*([self.fingerprint(of, seed)] if of else []), *self.arguments(name, seed)])

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """Returns the seeds that a row is run with: only the first one if nothing is trained."""
        row = self.grid.rows[name]
        return self.seeds if row.fitted or row.of else self.seeds[:1]


def _grid_file(name: str) -> Path:
    return paths.SHARED / "experiments" / name / "grid.yaml"


def _shipped(names: Sequence[str]) -> list[Path]:
    """Returns the files with these paths in the repository."""
    files = [paths.SHARED / name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"configs: {missing[0]}: no such file")
    return files


def _outputs(name: str, scale: str, data: str | None) -> Path:
    """Returns the usual output folder of an experiment, named after its scale and data too if they are not usual."""
    return Path("outputs", "-".join([name, *([scale] if scale != "tiny" else []), *([data] if data else [])]))
