"""Experiments: the rows of a grid, each fitted and tested by the same command line, put side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from instructedit.console import console
from instructedit.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.analysis import EditingAreas

#: Of a clone: where configs/ and experiments/ stand.
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One line of a grid.

    Attributes:
        name: What it is called in tables.
        editor: Name of its config under configs/editor/; ``configs/editor/<scale>/`` comes first.
        fit: Whether the editor is trained before it is tested; if not, one seed is enough.
        overrides: Its own further options.
    """

    name: str
    editor: str
    fit: bool = True
    overrides: tuple[str, ...] = ()


@dataclass
class Result:
    """What the runs of one row gave, over all seeds."""

    tables: list[DataFrame] = field(default_factory=list)
    areas: EditingAreas | None = None


@dataclass(frozen=True)
class Experiment:
    """A grid of runs at one scale (see `load`)."""

    name: str
    title: str
    rows: tuple[Row, ...]
    configs: tuple[Path, ...]
    scale: str
    seeds: tuple[int, ...]
    compare: tuple[tuple[str, str], ...]
    root: Path
    out: Path
    overrides: tuple[str, ...] = ()

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
    ) -> Self:
        """Reads ``experiments/<name>/grid.yaml``.

        Raises:
            UserError: If there is no such experiment, scale or row.
        """
        file = REPOSITORY / "experiments" / name / "grid.yaml"
        if not file.is_file():
            known = sorted(p.parent.name for p in (REPOSITORY / "experiments").glob("*/grid.yaml"))
            raise UserError(f"no experiment {name!r}; there are: {', '.join(known)}")
        grid = yaml.safe_load(file.read_text())
        if scale not in grid["scales"]:
            raise UserError(f"{file}: no scale {scale!r}; there are: {', '.join(grid['scales'])}")
        every = {key: Row(key, **spec) for key, spec in grid["rows"].items()}
        if unknown := sorted(set(rows or ()) - set(every)):
            raise UserError(f"{file}: no row {unknown[0]!r}; there are: {', '.join(every)}")
        return cls(
            name, grid["title"], tuple(every[key] for key in (rows or every)),
            tuple(REPOSITORY / path for path in [*grid["configs"], *grid["scales"][scale]]), scale,
            tuple(seeds or grid["seeds"]), tuple((a, b) for a, b in grid.get("compare", [])),
            Path(root), Path(out or f"outputs/{name}"), tuple(overrides or ()),
        )  # fmt: skip

    def run(self) -> DataFrame:
        """Runs every row with every seed, shows the table, writes and logs it with the figures.

        Returns:
            The summary: ``method, task, metric, mean, low, high, n``.
        """
        from instructedit.tracking import MLflowTracker

        with MLflowTracker(
            run_name=self.name, root=self.root, tags={"experiment": self.name, "scale": self.scale}
        ) as parent:
            results: dict[str, Result] = {}
            titles: dict[str, str] = {}
            for row in self.rows:
                results[row.name] = Result()
                for seed in self.seeds if row.fit else self.seeds[:1]:
                    trainer = self._run_row(row, seed, str(parent.run_id))
                    self._collect(trainer, results[row.name], titles)
            return self._report(results, titles, parent)

    def _run_row(self, row: Row, seed: int, parent: str) -> Any:
        """Fits and tests one row in one MLflow run; gives the Trainer that did."""
        from instructedit.lightning_cli import run

        console().rule(f"{row.name}, seed {seed}")
        own = REPOSITORY / "configs" / "editor" / self.scale / f"{row.editor}.yaml"
        editor = own if own.is_file() else REPOSITORY / "configs" / "editor" / f"{row.editor}.yaml"
        name = f"{self.name}/{row.name}/seed-{seed}"
        tags = {"experiment": self.name, "method": row.name, "scale": self.scale, "seed": str(seed)}
        logger = {"run_name": name, "root": str(self.root), "parent_run_id": parent, "tags": tags}
        args = [
            "fit" if row.fit else "test",
            f"--seed_everything={seed}",
            f"--data.seed={seed}",
            "--results.show=false",
        ]
        args += [f"--config={path}" for path in (*self.configs, editor)]
        args += [f"--trainer.logger.init_args.{key}={_text(value)}" for key, value in logger.items()]
        args += [f"--results.method={row.name}", *row.overrides, *self.overrides]
        cli = run(args)
        if row.fit:
            checkpoint: Any = cli.trainer.checkpoint_callback
            best = checkpoint.best_model_path
            cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=best or "last", verbose=False)
        return cli.trainer

    @staticmethod
    def _collect(trainer: Any, result: Result, titles: dict[str, str]) -> None:
        from instructedit.callbacks import EditingAreaDump, ResultTables
        from instructedit.callbacks.results import task_titles

        titles |= task_titles(trainer)
        for callback in trainer.callbacks:
            if isinstance(callback, ResultTables) and callback.table is not None:
                result.tables.append(callback.table)
            if isinstance(callback, EditingAreaDump):
                result.areas = result.areas or callback.areas

    def _report(self, results: dict[str, Result], titles: dict[str, str], parent: Any) -> DataFrame:
        import pandas as pd

        from instructedit.analysis import area_maps, markdown_table, metric_bars, rich_table, save_figure
        from instructedit.analysis.summary import compare, summarise

        tables = {name: pd.concat(result.tables) for name, result in results.items()}
        summary = pd.concat([summarise(table, name) for name, table in tables.items()])
        pairs = [compare(tables[a], tables[b], a, b) for a, b in self.compare if a in tables and b in tables]
        differences = pd.concat(pairs) if pairs else pd.DataFrame()
        self.out.mkdir(parents=True, exist_ok=True)
        figures = {"metrics": metric_bars(summary, titles=titles)}
        areas = {name: result.areas for name, result in results.items() if result.areas is not None}
        if areas:
            figures["areas"] = area_maps(areas)
        for name, figure in figures.items():
            save_figure(figure, self.out / name)
            parent.log_figure(figure, name)
        summary.to_csv(self.out / "summary.csv", index=False)
        (self.out / "table.md").write_text(f"# {self.title}\n\n{markdown_table(summary, titles=titles)}\n")
        parent.log_file(self.out / "table.md")
        parent.log_table(summary, "summary")
        out = console()
        out.print(rich_table(summary, titles=titles))
        for row in differences.itertuples():
            out.print(
                f"{row.method} − {row.baseline}, {titles.get(row.task, row.task)}, {row.metric}: "
                f"{row.mean:+.1f} [{row.low:+.1f}, {row.high:+.1f}], p = {row.p_value:.3f}"
            )
        if len(differences):
            differences.to_csv(self.out / "differences.csv", index=False)
            parent.log_table(differences, "differences")
        out.print(
            f"\ntables and figures: {self.out}/   runs: mlflow ui --backend-store-uri sqlite:///{self.root}/mlflow.db"
        )
        return summary


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict) else str(value)
