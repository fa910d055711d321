"""Running of one row and seed of an experiment, or reuse of an equal run from the store."""

from __future__ import annotations

import gc
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructedit.console import console
from instructedit.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.analysis import EditingAreas
    from instructedit.experiments.plan import Plan
    from instructedit.tracking import MLflowTracker

# Tags of a run. The fingerprint is set last, so that a run that was killed has none.
_FINGERPRINT, _TITLES, _CHECKPOINT, _BASE = "fingerprint", "titles", "checkpoint", "tests_run"


@dataclass(frozen=True)
class RunResult:
    """The results of one run, as read from the store.

    Attributes:
        run_id: Id of the MLflow run.
        seed: The seed that it was run with.
        table: Its probe rows (see `evaluate`).
        areas: Its editing areas, if it has any.
        titles: Task to its title in tables.
        root: Folder of the store.
    """

    run_id: str
    seed: int
    table: DataFrame
    areas: EditingAreas | None
    titles: dict[str, str]
    root: Path

    def artifact(self, name: str) -> Path:
        """Returns the path of a file or folder that the run logged, such as ``config.yaml`` or ``editor``.

        Raises:
            UserError: If the run did not log it.
        """
        from instructedit.tracking import artifact_path

        return artifact_path(self.run_id, name, self.root)


@dataclass
class Runner:
    """Runs rows, each row and seed once, or takes their results from the store."""

    experiment: Plan
    parent: MLflowTracker
    _done: dict[tuple[str, int], RunResult] = field(default_factory=dict)
    _broken: set[tuple[str, int]] = field(default_factory=set)

    def result(self, name: str, seed: int) -> RunResult:
        """Returns the results of one row and seed, which is run if the store has no equal run."""
        if (name, seed) not in self._done:
            self._done[name, seed] = self._reused(name, seed) or self._run(name, seed)
        return self._done[name, seed]

    def _checkpoint(self, name: str, seed: int) -> tuple[str, Path]:
        """Returns the id of the run that fitted a row, and its best checkpoint; without one, the row is run again."""
        if (name, seed) in self._broken:
            raise UserError(f"row {name!r}, which it tests, failed")
        file = self._checkpoint_of(self.result(name, seed))
        if file is None:
            gone = f"seed {seed}: the checkpoint of row {name!r} is gone: it is run again"
            console().print(gone, markup=False, highlight=False)
            file = self._checkpoint_of(self._run(name, seed))
        if file is None:
            raise UserError(f"row {name!r}: its run left no checkpoint")
        return self._done[name, seed].run_id, file

    def _checkpoint_of(self, result: RunResult) -> Path | None:
        checkpoint = self.parent.experiment.get_run(result.run_id).data.tags.get(_CHECKPOINT)
        file = result.root / checkpoint if checkpoint else None
        return file if file and file.is_file() else None

    def _reused(self, name: str, seed: int) -> RunResult | None:
        """Returns the newest run in the store with the same fingerprint and complete files, or None."""
        if self.experiment.force:
            return None
        client, mark = self.parent.experiment, self.experiment.fingerprint(name, seed)
        query = f"tags.{_FINGERPRINT} = '{mark}' and attributes.status = 'FINISHED'"
        for run in client.search_runs([self.parent.experiment_id], query):
            try:
                result = self._read(run.info.run_id, seed)
            except UserError as error:
                console().print(f"cannot be used again: {error}", markup=False)
                continue
            console().print(f"seed {seed}: run {result.run_id} of the store is used again", highlight=False)
            client.set_tag(str(self.parent.run_id), mlflow_name(f"reused.{name}/{seed}"), result.run_id)
            return result
        return None

    def _run(self, name: str, seed: int) -> RunResult:
        from instructedit.callbacks.editor_model import best_checkpoint
        from instructedit.tasks import task_name

        of, tags, checkpoint = self.experiment.grid.rows[name].of, {}, None
        if of:
            tags[_BASE], checkpoint = self._checkpoint(of, seed)
        console().print(f"seed {seed}" if (name, seed) not in self._done else f"{name}, seed {seed}", markup=False)
        try:
            cli = run_row(self.experiment, name, seed, self.parent, checkpoint)
        except Exception:
            self._broken.add((name, seed))
            raise
        data, run_id, client = cli.datamodule, cli.trainer.logger.run_id, self.parent.experiment
        tags |= {_TITLES: json.dumps(data.titles)}
        tags |= {
            f"tasks.{stage}": ",".join(task_name(source.name) for source in data.sources[stage])
            for stage in ("fit", "test")
        }
        if self.experiment.grid.rows[name].fitted:
            tags[_CHECKPOINT] = os.path.relpath(best_checkpoint(cli.trainer), self.experiment.root)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        result = self._done[name, seed] = self._read(run_id, seed)
        if result.areas is not None:
            self.log_norms(result)
        client.set_tag(run_id, _FINGERPRINT, self.experiment.fingerprint(name, seed))
        return result

    def log_norms(self, result: RunResult) -> None:
        """Logs the mean norm of each task's edits in each matrix, as ``update_norm.<task>/<matrix>``."""
        assert result.areas is not None
        tasks = list(dict.fromkeys(result.areas.tasks))
        for site, norms in result.areas.norms.items():
            for task in tasks:
                own = norms[[i for i, its in enumerate(result.areas.tasks) if its == task]]
                name = mlflow_name(f"update_norm.{task}/{site}")
                self.parent.experiment.log_metric(result.run_id, name, own.mean().item())

    def _read(self, run_id: str, seed: int) -> RunResult:
        from instructedit.analysis import EditingAreas
        from instructedit.tracking import artifact_path, load_table

        root = self.experiment.root
        table = load_table(run_id, "probes", root)
        areas = artifact_path(run_id, "tables", root).parent / "areas" / "areas.safetensors"
        titles = json.loads(self.parent.experiment.get_run(run_id).data.tags[_TITLES])
        return RunResult(run_id, seed, table, EditingAreas.load(areas) if areas.is_file() else None, titles, root)


def run_row(experiment: Plan, name: str, seed: int, parent: MLflowTracker, checkpoint: Path | None) -> Any:
    """Fits and tests one row, or only tests it, in one MLflow run; returns the command line object that did so."""
    from instructedit.callbacks.editor_model import best_checkpoint
    from instructedit.lightning_cli import run

    gc.collect()  # a Trainer has reference cycles, which would keep the previous LM in memory
    tags = {"experiment": experiment.name, "method": name, "scale": experiment.scale.name, "seed": str(seed)}
    logger = logger_options(f"{experiment.name}/{name}/seed-{seed}", tags, parent, experiment.root)
    arguments = [*experiment.arguments(name, seed), *logger]
    if not experiment.grid.rows[name].fitted:
        return run([*arguments, *([f"--ckpt_path={checkpoint}"] if checkpoint else [])])
    cli = run(arguments)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=best_checkpoint(cli.trainer), verbose=False)
    return cli


def logger_options(run_name: str, tags: dict[str, str], parent: MLflowTracker, root: Path) -> list[str]:
    """Returns options that make a run a child of the experiment's run."""
    logger = {"run_name": run_name, "root": root, "parent_run_id": parent.run_id, "tags": json.dumps(tags)}
    return [f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()]


def mlflow_name(name: str) -> str:
    """Replaces the characters of a name that MLflow does not allow by underscores."""
    return re.sub(r"[^\w .:/-]", "_", name)
