"""Experiments: the rows of a grid, each fitted and tested by the same command line, put side by side."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import yaml

from instructedit.console import console
from instructedit.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.analysis import EditingAreas
    from instructedit.tracking import MLflowTracker

#: Of a clone: where configs/ and experiments/ stand.
REPOSITORY = Path(__file__).resolve().parents[2]

_FINGERPRINT, _TITLES = "fingerprint", "titles"  # tags of a run that is whole

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of a grid.

    Attributes:
        editor: Name of its config under configs/editor/.
        fit: Whether the editor is trained before it is tested; if not, one seed is enough.
        overrides: Its own further options.
    """

    editor: str
    fit: bool = True
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """A language model and what goes with it.

    Attributes:
        configs: Further configs of every run, relative to the repository.
        editors: The folder under configs/editor/ whose files come before those of configs/editor/ itself, or several
            in order; by default the one with the scale's name.
        paper: The model whose published figures stand beside ours.
    """

    configs: tuple[str, ...]
    editors: str | tuple[str, ...] | None = None
    paper: str | None = None


@dataclass(frozen=True)
class Grid:
    """What a ``grid.yaml`` says.

    Attributes:
        title: Of the result table.
        seeds: Every fitted row is run once with each.
        configs: Of every run, relative to the repository.
        rows: Name in tables to the row.
        scales: Name to the scale.
        compare: Pairs of a row and a baseline, whose difference is tested.
        layout: Of the result table: ``wide``, or ``tall`` for many rows.
        paper: A file of published figures beside the grid, ``model,method,task,metric,mean``.
    """

    title: str
    seeds: tuple[int, ...]
    configs: tuple[str, ...]
    rows: dict[str, Row]
    scales: dict[str, Scale]
    compare: tuple[tuple[str, str], ...] = ()
    layout: Literal["wide", "tall"] = "wide"
    paper: str | None = None

    @classmethod
    def load(cls, file: Path) -> Self:
        """Reads a grid.

        Raises:
            UserError: If it is not YAML, or a key is missing, unknown or of the wrong kind.
        """
        try:
            spec = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{file}: not YAML: {error}") from error
        for key, kind in (("rows", Row), ("scales", Scale)):
            if isinstance(spec, dict) and isinstance(spec.get(key), dict):
                spec[key] = {name: _parsed(kind, part, f"{file}: {key}: {name}") for name, part in spec[key].items()}
        grid = _parsed(cls, spec, str(file))
        if unknown := [name for pair in grid.compare for name in pair if name not in grid.rows]:
            raise UserError(f"{file}: compare: no row {unknown[0]!r}; there are: {', '.join(grid.rows)}")
        return grid


@dataclass(frozen=True)
class Child:
    """What one run left in the store: its probes, its editing areas if it has any, and the titles of its tasks."""

    table: DataFrame
    areas: EditingAreas | None
    titles: dict[str, str]


@dataclass(frozen=True)
class Experiment:
    """A grid at one scale (see `load`).

    Attributes:
        name: Of its folder under experiments/.
        grid: The whole grid.
        scale: Name of the scale.
        rows: Names of the rows to run.
        seeds: The seeds to run them with.
        published: Figures to put beside ours, ``method, task, metric, mean``.
        root: Folder of the MLflow store.
        out: Folder of tables and figures.
        overrides: Further options of every run.
        fresh: Run also what the store has.
    """

    name: str
    grid: Grid
    scale: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    published: DataFrame | None
    root: Path
    out: Path
    overrides: tuple[str, ...] = ()
    fresh: bool = False

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
    ) -> Self:
        """Reads ``experiments/<name>/grid.yaml``.

        Raises:
            UserError: If there is no such experiment, scale, row, config or published figure, or the grid is wrong.
        """
        file = REPOSITORY / "experiments" / name / "grid.yaml"
        if not file.is_file():
            known = sorted(p.parent.name for p in (REPOSITORY / "experiments").glob("*/grid.yaml"))
            raise UserError(f"no experiment {name!r}; there are: {', '.join(known)}")
        grid = Grid.load(file)
        if scale not in grid.scales:
            raise UserError(f"{file}: no scale {scale!r}; there are: {', '.join(grid.scales)}")
        if unknown := sorted(set(rows or ()) - set(grid.rows)):
            raise UserError(f"{file}: no row {unknown[0]!r}; there are: {', '.join(grid.rows)}")
        model = grid.scales[scale].paper
        if model and not grid.paper:
            raise UserError(f"{file}: scales: {scale}: paper needs the grid's own key paper, a file")
        published = _published(file.parent / grid.paper, model) if grid.paper and model else None
        experiment = cls(
            name, grid, scale, tuple(rows or grid.rows), tuple(seeds or grid.seeds), published,
            Path(root), Path(out or f"outputs/{name}"), tuple(overrides or ()), fresh,
        )  # fmt: skip
        for key in experiment.rows:
            experiment.configs(key)  # a file that is missing is missed now, not after hours
        return experiment

    def configs(self, name: str) -> list[Path]:
        """The config files of a row.

        Raises:
            UserError: If its editor has none.
        """
        scale, editor = self.grid.scales[self.scale], self.grid.rows[name].editor
        folders = [scale.editors] if isinstance(scale.editors, str) else scale.editors or [self.scale]
        choices = [REPOSITORY / "configs" / "editor" / folder / f"{editor}.yaml" for folder in (*folders, "")]
        own = next((path for path in choices if path.is_file()), None)
        if own is None:
            raise UserError(
                f"row {name!r}: no config of the editor {editor!r}: neither of {', '.join(map(str, choices))}"
            )
        return [*(REPOSITORY / path for path in (*self.grid.configs, *scale.configs)), own]

    def arguments(self, name: str, seed: int) -> list[str]:
        """The command line of a row, without its place in the store."""
        row = self.grid.rows[name]
        return [
            "fit" if row.fit else "test", f"--seed_everything={seed}", f"--data.seed={seed}", "--results.show=false",
            *(f"--config={path}" for path in self.configs(name)),
            f"--results.method={name}", *row.overrides, *self.overrides,
        ]  # fmt: skip

    def run(self) -> DataFrame:
        """Runs every row with every seed, shows the table, writes and logs it with the figures.

        A run that the store has already, whole and with the same fingerprint, is not run again.

        Returns:
            The summary: ``method, task, metric, mean, low, high, n``.

        Raises:
            UserError: If rows failed; the others' table has been written.
        """
        from instructedit.tracking import MLflowTracker

        with MLflowTracker(
            run_name=self.name, root=self.root, tags={"experiment": self.name, "scale": self.scale}
        ) as parent:
            found: dict[str, list[Child]] = {}
            for i, name in enumerate(self.rows, 1):
                console().rule(f"row {i} of {len(self.rows)}: {name}")
                seeds = self.seeds if self.grid.rows[name].fit else self.seeds[:1]
                try:
                    found[name] = [self._child(name, seed, parent) for seed in seeds]
                except Exception as error:  # any: the rows to come may need less memory, say
                    if not isinstance(error, UserError):
                        traceback.print_exc()
                    print(f"instructedit: error: row {name!r}: {' '.join(str(error).split())}", file=sys.stderr)
            summary = self._report(found, parent) if found else None
            failed = [name for name in self.rows if name not in found]
            if summary is None or failed:
                raise UserError(f"{len(failed)} of {len(self.rows)} rows failed, see above: {', '.join(failed)}")
            return summary

    def _child(self, name: str, seed: int, parent: MLflowTracker) -> Child:
        """The results of one row and seed, from the store if it has them."""
        from instructedit.callbacks.results import task_titles

        client, mark = parent.experiment, fingerprint(self.arguments(name, seed))
        if not self.fresh and (old := self._finished(mark, parent)):
            run_id, child = old
            console().print(f"seed {seed}: run {run_id} of the store is used again", highlight=False)
            tag = re.sub(r"[^\w .:/-]", "_", f"reused.{name}/{seed}")  # the characters that MLflow allows
            client.set_tag(str(parent.run_id), tag, run_id)
            return child
        console().print(f"seed {seed}")
        trainer = self._run_row(name, seed, parent)
        run_id = trainer.logger.run_id
        client.set_tag(run_id, _TITLES, json.dumps(task_titles(trainer)))
        child = self._read(run_id, parent)
        client.set_tag(run_id, _FINGERPRINT, mark)  # last of all: a run that was killed has none
        return child

    def _finished(self, mark: str, parent: MLflowTracker) -> tuple[str, Child] | None:
        """The newest run with this fingerprint whose files are there, and its results."""
        wanted = f"tags.{_FINGERPRINT} = '{mark}' and attributes.status = 'FINISHED'"
        for run in parent.experiment.search_runs([parent.experiment_id], wanted):
            try:
                return run.info.run_id, self._read(run.info.run_id, parent)
            except UserError as error:
                console().print(f"cannot be used again: {error}", markup=False)
        return None

    def _run_row(self, name: str, seed: int, parent: MLflowTracker) -> Any:
        """Fits and tests one row in one MLflow run; gives the Trainer that did."""
        from instructedit.lightning_cli import run

        gc.collect()  # a Trainer is full of circles: the last one's LM would stay beside this one's
        tags = {"experiment": self.name, "method": name, "scale": self.scale, "seed": str(seed)}
        logger = {"run_name": f"{self.name}/{name}/seed-{seed}", "root": self.root, "parent_run_id": parent.run_id}
        logger["tags"] = json.dumps(tags)
        place = [f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()]
        cli = run([*self.arguments(name, seed), *place])
        if self.grid.rows[name].fit:
            checkpoint: Any = cli.trainer.checkpoint_callback
            best = checkpoint.best_model_path
            cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=best or "last", verbose=False)
        return cli.trainer

    def _read(self, run_id: str, parent: MLflowTracker) -> Child:
        from instructedit.analysis import EditingAreas
        from instructedit.tracking import artifact_path, load_table

        table = load_table(run_id, "probes", self.root)
        areas = artifact_path(run_id, "tables", self.root).parent / "areas" / "areas.safetensors"
        titles = json.loads(parent.experiment.get_run(run_id).data.tags[_TITLES])
        return Child(table, EditingAreas.load(areas) if areas.is_file() else None, titles)

    def _report(self, found: dict[str, list[Child]], parent: MLflowTracker) -> DataFrame:
        """Table and differences first: a figure that fails must not take them along."""
        import pandas as pd

        from instructedit.analysis import markdown_table, rich_table
        from instructedit.analysis.summary import compare, summarise

        out, layout, published = console(), self.grid.layout, self.published
        titles = {task: title for children in found.values() for task, title in children[0].titles.items()}
        tables = {name: pd.concat([child.table for child in children]) for name, children in found.items()}
        summary = pd.concat([summarise(table, name) for name, table in tables.items()])
        pairs = [compare(tables[a], tables[b], a, b) for a, b in self.grid.compare if a in tables and b in tables]
        differences = pd.concat(pairs) if pairs else pd.DataFrame()
        notes = [] if published is None else [f"paper: published figures for {self.grid.scales[self.scale].paper}"]

        self.out.mkdir(parents=True, exist_ok=True)
        table = markdown_table(summary, titles, published, layout=layout)
        (self.out / "table.md").write_text("\n\n".join([f"# {self.grid.title}", *notes, table]))
        summary.to_csv(self.out / "summary.csv", index=False)
        parent.log_file(self.out / "table.md")
        parent.log_table(summary, "summary")
        out.print(rich_table(summary, titles, published, layout=layout), *notes)
        for row in differences.itertuples():
            out.print(
                f"{row.method} − {row.baseline}, {titles.get(row.task, row.task)}, {row.metric}: "
                f"{row.mean:+.1f} [{row.low:+.1f}, {row.high:+.1f}], p = {row.p_value:.3f}"
            )
        if len(differences):
            differences.to_csv(self.out / "differences.csv", index=False)
            parent.log_table(differences, "differences")
        self._draw(summary, titles, found, parent)
        out.print(
            f"\ntables and figures: {self.out}/   runs: mlflow ui --backend-store-uri sqlite:///{self.root}/mlflow.db"
        )
        return summary

    def _draw(
        self, summary: DataFrame, titles: dict[str, str], found: dict[str, list[Child]], parent: MLflowTracker
    ) -> None:
        from instructedit.analysis import area_maps, metric_bars, metric_dots, save_figure

        tall = self.grid.layout == "tall"
        figures = {"metrics": metric_dots(summary, titles, self.published) if tall else metric_bars(summary, titles)}
        areas = {name: children[0].areas for name, children in found.items()}
        if some := {name: own for name, own in areas.items() if own is not None}:
            figures["areas"] = area_maps(some)
        for name, figure in figures.items():
            save_figure(figure, self.out / name)
            parent.log_figure(figure, name)


def fingerprint(args: Sequence[str]) -> str:
    """sha256 (hex) of what a run is made from: its command line, the files that this names, and the package.

    A file counts with its contents, wherever it lies. Folders (a local LM, datasets), the hub, the installed packages
    and the machine are not looked at.
    """
    parts = [_package()]
    for arg in args:
        option, _, value = arg.partition("=")
        parts.append(f"{option}={_sha256(Path(value))}" if os.path.isfile(value) else arg)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _package() -> str:
    """Of the code and the data that it ships, but for what only shows results."""
    source = Path(__file__).parent
    shows = {source / name for name in ("analysis", "experiment.py", "commands", "cli.py", "console.py")}
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc")
    files = [path for path in files if shows.isdisjoint((path, *path.parents))]
    names = [path.relative_to(source).as_posix() for path in files]
    return hashlib.sha256(json.dumps([*zip(names, map(_sha256, files), strict=True)]).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(kind: type[T], spec: Any, where: str) -> T:
    """A dataclass from plain data, its keys and their types checked."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        if not isinstance(spec, dict):
            raise TypeError(f"expected keys and values, got {spec!r}")
        return kind(**vars(parser.instantiate(parser.parse_object(spec))))
    except (ArgumentError, TypeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _published(file: Path, model: str) -> DataFrame:
    """One model's part of a file of published figures, its five columns less the model."""
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
