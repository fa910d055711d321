"""An experiment: a grid at one scale. It is run row by row, and shown by the grid's views."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from instructedit import paths
from instructedit.configs import Scale, located
from instructedit.console import console
from instructedit.errors import UserError, unknown
from instructedit.experiments.fingerprint import fingerprint
from instructedit.experiments.grid import Grid, published

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.experiments.runs import Child, Runner


@dataclass(frozen=True)
class Experiment:
    """A grid at one scale (see `load`).

    Attributes:
        name: Of its folder under experiments/.
        grid: The whole grid.
        scale: The language model and what goes with it.
        rows: Names of the rows to run.
        seeds: The seeds to run them with.
        published: Figures to put beside ours, ``method, task, metric, mean``.
        root: Folder of the MLflow store.
        out: Folder of the results page, tables and figures.
        overrides: Further options of every run.
        fresh: Run also what the store has.
        data: Name of a config under configs/data/ that says where the records lie; None leaves that to the scale.
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
    fresh: bool = False
    data: str | None = None

    @classmethod
    def load(
        cls,
        name: str,
        scale: str = "tiny",
        seeds: list[int] | None = None,
        rows: list[str] | None = None,
        root: str = "mlruns",
        out: str | None = None,
        overrides: list[str] | None = None,
        fresh: bool = False,
        data: str | None = None,
    ) -> Self:
        """Reads ``experiments/<name>/grid.yaml``.

        Raises:
            UserError: If there is no such experiment, scale, row, config or published figure, or the grid is wrong.
        """
        folder = paths.SHARED / "experiments"
        file = folder / name / "grid.yaml"
        if not file.is_file():
            raise unknown("experiment", name, sorted(p.parent.name for p in folder.glob("*/grid.yaml")))
        grid, at = Grid.load(file), Scale.load(scale)
        if strange := sorted(set(rows or ()) - set(grid.rows)):
            raise UserError(f"{file}: {unknown('row', strange[0], list(grid.rows))}")
        model = grid.paper_model or at.paper
        figures = published(file.parent / grid.paper, model) if grid.paper and model else None
        wanted = rows or [key for key, row in grid.rows.items() if not row.hidden]
        place = Path(out or f"outputs/{_place(name, at.name, data)}")
        experiment = cls(
            name, grid, at, tuple(wanted), tuple(seeds or grid.seeds), figures, Path(root), place,
            tuple(located(overrides or ())), fresh, data,
        )  # fmt: skip
        for key in grid.rows:
            experiment.configs(key)  # a file that is missing is missed now, not after hours
        return experiment

    @property
    def command(self) -> str:
        """The command line that runs this experiment."""
        parts = ["instructedit", "experiment", self.name, "--scale", self.scale.option]
        parts += ["--seeds", json.dumps(self.seeds)]
        parts += ["--data", self.data] if self.data else []
        if self.rows != tuple(key for key, row in self.grid.rows.items() if not row.hidden):
            parts += ["--rows", json.dumps(self.rows, ensure_ascii=False)]
        return shlex.join(
            parts + (["--overrides", json.dumps(self.overrides, ensure_ascii=False)] if self.overrides else [])
        )

    def configs(self, name: str) -> list[Path]:
        """The config files of a row, of a row with ``of`` first those of the other row.

        Raises:
            UserError: If its editor has none, or one of its own is not there.
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
        """The command line of a row, without its place in the store and the checkpoint that it tests."""
        command = "fit" if self.grid.rows[name].fitted else "test"
        seeded = (f"--seed_everything={seed}", f"--data.seed={seed}")
        return [
            command, *seeded, "--results.show=false", *self._options(name), f"--results.method={name}", *self.overrides
        ]  # fmt: skip

    def _options(self, name: str) -> list[str]:
        """Configs and overrides; what a row with ``of`` says itself comes after all that the other row says."""
        row = self.grid.rows[name]
        first = self._options(row.of) if row.of else [f"--config={path}" for path in self._shared_configs(name)]
        return [*first, *(f"--config={path}" for path in self._own_configs(name)), *row.overrides]

    def fingerprint(self, name: str, seed: int) -> str:
        """Of one run of a row; that of a row with ``of`` counts the other row's."""
        of = self.grid.rows[name].of
        return fingerprint([*([self.fingerprint(of, seed)] if of else []), *self.arguments(name, seed)])

    def run(self) -> DataFrame:
        """Runs the search, then every row with every seed; shows, writes and logs what the views make of them.

        A run that the store has already, whole and with the same fingerprint, is not run again.

        Returns:
            The summary: ``method, task, metric, mean, low, high, n, seeds, spread``.

        Raises:
            UserError: If rows or views failed; what the others gave has been written.
        """
        from instructedit.experiments.runs import Runner
        from instructedit.tracking import MLflowTracker

        tags = {"experiment": self.name, "scale": self.scale.name, "seeds": ",".join(map(str, self.seeds))}
        with MLflowTracker(run_name=self.name, root=self.root, tags=tags) as parent:
            return self._run(Runner(self, parent))

    def _run(self, runner: Runner) -> DataFrame:
        from instructedit.experiments.report import report
        from instructedit.experiments.search import search
        from instructedit.experiments.views import Results

        trials, trouble = None, []
        if self.grid.search:
            try:
                trials = search(self, runner.parent)
            except Exception as error:  # any, as for rows
                complain("search", error)
                trouble = ["the search failed, see above"]
        done = [name for i, name in enumerate(self.rows, 1) if self._run_row(i, name, runner)]
        failed = [name for name in self.rows if name not in done]
        if failed:
            trouble.append(f"{len(failed)} of {len(self.rows)} rows failed, see above: {', '.join(failed)}")
        # Only now: the run that a row tests may have been run again after its own row was through.
        found = {name: [runner.child(name, seed) for seed in self.seeds_of(name)] for name in done}
        if failed and not found:
            raise UserError("; ".join(trouble))
        titles = shared_titles([children[0].titles for children in found.values()])
        results = Results(self.name, self.grid, self.scale, found, self.published, titles, trials)
        trouble += report(self, results, runner.parent, trouble)
        if trouble:
            raise UserError("; ".join(trouble))
        return results.summary

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds that a row is run with: the first one alone if nothing is trained."""
        row = self.grid.rows[name]
        return self.seeds if row.fitted or row.of else self.seeds[:1]

    def _run_row(self, number: int, name: str, runner: Runner) -> bool:
        """Whether all seeds went through."""
        console().rule(f"row {number} of {len(self.rows)}: {name}")
        try:
            children: list[Child] = [runner.child(name, seed) for seed in self.seeds_of(name)]
        except Exception as error:  # any: the rows to come may need less memory, say
            complain(f"row {name!r}", error)
            return False
        return bool(children)


def _shipped(names: Sequence[str]) -> list[Path]:
    """Files by their paths in the repository."""
    files = [paths.SHARED / name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"configs: {missing[0]}: no such file")
    return files


def _place(name: str, scale: str, data: str | None) -> str:
    """Where an experiment's page goes: what was asked for beside the name stands in it."""
    return "-".join([name, *([scale] if scale != "tiny" else []), *([data] if data else [])])


def shared_titles(runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Task to its name in tables; a task that some rows held out and others trained on goes by its name alone."""
    from instructedit.tasks import task_title

    every: dict[str, set[str]] = {}
    for titles in runs:
        for task, title in titles.items():
            every.setdefault(task, set()).add(title)
    return {task: found.pop() if len(found) == 1 else task_title(task) for task, found in every.items()}


def complain(what: str, error: Exception) -> None:
    """One line about what failed; with the traceback unless the user is to blame."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    print(f"instructedit: error: {what}: {' '.join(str(error).split())}", file=sys.stderr)
