"""Experiment tracking: an MLflow store under ``mlruns/``, what is logged there, and reading it back.

The store is ``mlruns/mlflow.db``; artifacts lie under ``mlruns/artifacts/<experiment>/<run>/``, checkpoints under
``mlruns/<experiment id>/<run>/checkpoints/``. To look at it::

    mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db --workers 1
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from instructedit.artifacts import Artifacts, artifacts
from instructedit.errors import UserError
from instructedit.locks import Alive, dead
from instructedit.provenance import flat_parameters, provenance
from instructedit.redaction import redacted
from instructedit.registered import describe_model, register
from instructedit.stores import DATABASE, local_store

if TYPE_CHECKING:
    import jsonargparse
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from pandas import DataFrame

_LONGEST_VALUE = 6000  # characters that MLflow keeps of a parameter
_LARGEST_BATCH = 100  # parameters, and tags, that MLflow takes at once
_LONGEST_DIGEST = 36  # characters that MLflow keeps of a dataset's digest
_PROCESS = "process"  # tag: name of the file in running/ of the process that logs the run
_PARENT = "mlflow.parentRunId"
_KIND = "mlflow.experimentKind"  # which of its two layouts the UI shows
_MOST_RUNS = 50_000  # runs that MLflow finds in one search
_LISTED = 20  # names that an error lists: it stays one readable line

# Lightning says "finished" only when SLURM is about to stop the job and queue it again.
_STATUS = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "finished": "KILLED"}


class MLflowTracker(Artifacts, MLFlowLogger):
    """Logger for MLflow, by default with a local store, which needs no server.

    A run starts when something is first logged, with the tags ``provenance.*``. Lightning's Trainer ends it: FINISHED,
    FAILED after an exception, KILLED after Ctrl-C or SIGTERM. Without a Trainer, use ``with tracker:``; a run that is
    still open when the process exits is FAILED.

    Args:
        experiment_name: The MLflow experiment that the run belongs to; created if it does not exist.
        run_name: Name of the run; MLflow makes one up by default.
        root: Folder of the local store and of the checkpoints; created if it does not exist.
        tracking_uri: Address of an MLflow server, or another store, to use in place of the local one.
        parent_run_id: The run to show this one under, as one of several that belong together.
        tags: Further tags for the run.
        run_id: An existing run to continue. Parameters and tags that have changed keep their first value; the new
            value becomes a tag, ``changed.<name>``.
    """

    def __init__(
        self,
        experiment_name: str = "instructedit",
        run_name: str | None = None,
        root: str | Path = "mlruns",
        tracking_uri: str | None = None,
        parent_run_id: str | None = None,
        tags: dict[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        self._root = Path(root).expanduser().absolute()
        artifacts = None
        if tracking_uri is None:
            tracking_uri = local_store(self._root)
            artifacts = (self._root / "artifacts" / experiment_name).as_uri()
        tags = (tags or {}) | ({_PARENT: parent_run_id} if parent_run_id else {})
        super().__init__(experiment_name, run_name, tracking_uri, tags, artifact_location=artifacts, run_id=run_id)
        self._running = False
        self._local = artifacts is not None
        self._alive: Alive | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The MLflow client; the first access starts the run.

        Raises:
            UserError: If the run to continue does not exist.
        """
        if not self._initialized:
            self._start({f"provenance.{name}": value for name, value in provenance().items()})
            self._running = True
            atexit.register(self._abandon)
        client: MlflowClient = super().experiment
        return client

    def _start(self, facts: dict[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        self.tags = facts | (self.tags or {})
        process = secrets.token_hex(16)
        if self._local:
            _mark_dead(self._mlflow_client, self._root)
            self._alive = Alive(self._root, process)  # before there is a run that could be taken for dead
        if self._run_id is not None:
            _run(self._mlflow_client, self._run_id, self._tracking_uri)
            self._mlflow_client.set_tag(self._run_id, _PROCESS, process)
            self._mlflow_client.update_run(self._run_id, status="RUNNING")
            self._log(self._mlflow_client, {}, self.tags)
        else:
            self.tags[_PROCESS] = process
            with suppress(MlflowException):  # of several first runs at once, only one creates the experiment
                self._mlflow_client.create_experiment(
                    self._experiment_name, self._artifact_location, {_KIND: "custom_model_development"}
                )

    def describe(self, name: str, tags: Mapping[str, str]) -> None:
        """Sets a run's name, if it has none, and further tags before it starts; a continued run keeps its own."""
        if self._run_id is None:
            self._run_name = self._run_name or name
            self.tags = {**tags, **(self.tags or {})}

    @property
    def is_child(self) -> bool:
        """True if the run is one of several that belong together, such as the rows of an experiment."""
        return _PARENT in (self.tags or {})

    def _log(self, client: MlflowClient, params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        run_id = str(self._run_id)
        data = client.get_run(run_id).data
        there = ((data.params, params), (data.tags, tags))
        changed = {
            f"changed.{n}": value for old, new in there for n, value in new.items() if old.get(n, value) != value
        }
        new_params = [Param(*item) for item in params.items() if item[0] not in data.params]
        new_tags = [RunTag(*item) for item in tags.items() if item[0] not in data.tags]
        new_tags += [RunTag(*item) for item in changed.items()]
        for start in range(0, max(len(new_params), len(new_tags)), _LARGEST_BATCH):
            part = slice(start, start + _LARGEST_BATCH)
            client.log_batch(run_id, params=new_params[part], tags=new_tags[part])

    @property
    def save_dir(self) -> str:
        """Folder below which the Trainer puts checkpoints, even when a server keeps the rest."""
        return str(self._root)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Logs parameters, nested ones as ``a/b``; a changed value becomes a tag, since MLflow keeps the first one."""
        flat = flat_parameters(params)
        # LightningCLI leaves `_instantiator` among the hyper-parameters.
        new = {k: str(v)[:_LONGEST_VALUE] for k, v in flat.items() if k.split("/")[-1] != "_instantiator"}
        self._log(self.experiment, new, {})

    @rank_zero_only
    def log_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        """Logs which data the run used, as tags ``data.<name>``: ``{"counterfact/train": "<sha256>"}``.

        Warns if a continued run reads other data than it began with.
        """
        tags = {f"data.{name}": value for name, value in fingerprints.items()}
        began = self.experiment.get_run(str(self.run_id)).data.tags
        for name, value in tags.items():
            if began.get(name, value) != value:
                warnings.warn(f"{name}: the run began with other data (sha256 {began[name][:12]})", stacklevel=2)
        self._log(self.experiment, {}, tags)

    @rank_zero_only
    def log_datasets(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=f"{each['task']}/{each['split']}", digest=each["fingerprint"][:_LONGEST_DIGEST],
                    source_type="records", source=json.dumps({"source": each["source"]}),
                    profile=json.dumps({"num_records": each["kept"]}),
                ),
                [InputTag("mlflow.data.context", each["split"])],
            )
            for each in datasets
        ]  # fmt: skip
        if inputs:
            self.experiment.log_inputs(self.run_id, inputs)

    @rank_zero_only
    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Logs a copy of a file, or of a folder, below the artifact folder ``folder``."""
        self.experiment.log_artifact(self.run_id, str(path), folder)

    @rank_zero_only
    def log_editor(self, folder: Path, name: str, example: dict[str, str]) -> None:
        """Logs a saved editor's folder as an MLflow model, and registers it unless the run is one of several."""
        describe_model(folder, str(self.run_id), example)
        self.log_file(folder)
        if not self.is_child:
            register(self.experiment, name, str(self.run_id), folder.name)

    def has(self, name: str) -> bool:
        return name in {file.path for file in self.experiment.list_artifacts(self.run_id)}

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Ends the run, with interrupts and failures distinguished: Lightning reports "failed" for every exception."""
        if status == "failed" and isinstance(sys.exc_info()[1], (KeyboardInterrupt, SystemExit)):
            status = "interrupted"
        super().finalize(_STATUS.get(status, status))
        self._running = False
        if self._alive is not None:
            self._alive.end()
            self._alive = None

    def _abandon(self) -> None:
        if self._running:
            self.finalize("failed")

    def __enter__(self) -> Self:
        _ = self.experiment
        return self

    def __exit__(self, *error: object) -> None:
        self.finalize("failed" if any(error) else "success")


class SaveConfig(SaveConfigCallback):
    """Callback that logs a command's whole configuration as ``config.yaml``, with which it can be run again."""

    def __init__(self, parser: LightningArgumentParser, config: jsonargparse.Namespace, **options: Any) -> None:
        # All runs share the log folder, where the second run's file would be refused.
        super().__init__(parser, config, **{"save_to_log_dir": False, **options})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Logs the configuration, except in `fast_dev_run`, which keeps nothing. Called on rank zero only."""
        text = redacted(self.parser.dump(self.config, skip_unset=False))
        for keeper in artifacts(trainer):
            # A `test` in the run of its `fit` must not take the place of the fit's configuration.
            again = keeper.has(self.config_filename)
            keeper.log_text(text, f"config.{TrainerFn(stage).value}.yaml" if again else self.config_filename)


def runs(experiment: str = "instructedit", root: str | Path = "mlruns") -> DataFrame:
    """Tabulates the runs of an experiment in a local store, the newest first.

    Returns:
        Columns run_id, name, status, parent (run id or None), then params.* (strings) and metrics.* (last values).

    Raises:
        UserError: If there is no such store or experiment.
    """
    from pandas import DataFrame

    client = _client(root)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [each.name for each in client.search_experiments()]
        raise UserError(f"{root}: no experiment {experiment!r}; there are: {', '.join(names[:_LISTED]) or 'none'}")
    rows = [
        {"run_id": run.info.run_id, "name": run.info.run_name, "status": run.info.status}
        | {"parent": run.data.tags.get(_PARENT)}
        | {f"params.{name}": value for name, value in run.data.params.items()}
        | {f"metrics.{name}": value for name, value in run.data.metrics.items()}
        for run in client.search_runs([found.experiment_id], max_results=_MOST_RUNS)
    ]
    first = ["run_id", "name", "status", "parent"]
    rest = {column for row in rows for column in row} - set(first)
    return DataFrame(rows, columns=first + sorted(rest, key=lambda column: (column.startswith("metrics."), column)))


def finished_runs(root: str | Path = "mlruns") -> list[tuple[str, str]]:
    """Lists the finished runs of all experiments in a local store, the most recently ended first.

    Returns:
        (run id, name) of each; none where there is no store.
    """
    if not (Path(root).expanduser() / DATABASE).is_file():
        return []
    found = _search(root, "attributes.status = 'FINISHED'", "attributes.end_time DESC")
    return [(run.info.run_id, run.info.run_name) for run in found]


def recent_runs(root: str | Path = "mlruns", children: bool = False) -> list[Run]:
    """Lists the runs of all experiments in a local store, the most recently started first.

    Args:
        root: Folder of the store.
        children: Include the runs that belong to another, such as the rows of an experiment.

    Raises:
        UserError: If there is no such store.
    """
    if os.access(folder := Path(root).expanduser(), os.W_OK):
        _mark_dead(_client(folder), folder)
    found = _search(root, "", "attributes.start_time DESC")
    return found if children else [run for run in found if _PARENT not in run.data.tags]


def _search(root: str | Path, wanted: str, order: str) -> list[Run]:
    client = _client(root)
    every = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_runs(every, wanted, max_results=_MOST_RUNS, order_by=[order]))


def find_run(run: str, root: str | Path = "mlruns") -> Run:
    """Finds a run in a local store by its id, or by the name of a finished run.

    Raises:
        UserError: If there is no such store or run, or several finished runs have the name.
    """
    named = [run_id for run_id, name in finished_runs(root) if name == run]
    if len(named) > 1:
        raise UserError(f"{run}: {len(named)} finished runs have this name; give the id of one: {', '.join(named)}")
    return _run(_client(root), named[0] if named else run, str(root))


def artifact_path(run_id: str, name: str, root: str | Path = "mlruns") -> Path:
    """Finds an artifact file or folder of a run in a local store, e.g. ``figures/areas.png``.

    Raises:
        UserError: If there is no such store, run or artifact.
    """
    client = _client(root)
    experiment = client.get_experiment(_run(client, run_id, str(root)).info.experiment_id).name
    # The database has absolute paths, which are wrong once the store was moved or copied; the layout stays.
    folder = Path(root).expanduser() / "artifacts" / experiment / run_id / "artifacts"
    if not (folder / name).exists():
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        raise UserError(f"run {run_id}: no artifact {name!r}; there are: {', '.join(names[:_LISTED]) or 'none'}")
    return folder / name


def load_table(run_id: str, name: str, root: str | Path = "mlruns") -> DataFrame:
    """Reads a table that `MLflowTracker.log_table` wrote.

    Raises:
        UserError: If there is no such store, run or table.
    """
    from pandas import read_parquet

    return read_parquet(artifact_path(run_id, f"tables/{name}.parquet", root))


def _mark_dead(client: MlflowClient, root: Path) -> None:
    """Marks as KILLED the runs whose process was killed, which otherwise would stay RUNNING for ever."""
    for process in dead(root):
        experiments = [each.experiment_id for each in client.search_experiments()]
        for run in client.search_runs(experiments, f"tags.{_PROCESS} = '{process}'"):
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, status="KILLED")


def unfinished_run(checkpoint: Path, root: str | Path = "mlruns") -> str | None:
    """Returns the id of the run that a checkpoint belongs to, if it was killed or failed; None otherwise."""
    folder = Path(root).expanduser().absolute()
    try:
        _, run_id, *_ = checkpoint.absolute().relative_to(folder).parts
        client = _client(folder)
        _mark_dead(client, folder)
        status = _run(client, run_id, str(root)).info.status
    except ValueError:  # it lies elsewhere, or there is no such run or store
        return None
    return run_id if status in ("KILLED", "FAILED") else None


def _client(root: str | Path) -> MlflowClient:
    folder = Path(root).expanduser().absolute()
    if not (folder / DATABASE).is_file():
        raise UserError(f"{root}: no MLflow store ({DATABASE}) in this folder")
    from mlflow import MlflowClient

    return MlflowClient(local_store(folder))


def _run(client: MlflowClient, run_id: str, store: str) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        every = client.search_runs([each.experiment_id for each in client.search_experiments()])
        names = [f"{run.info.run_id} ({run.info.run_name})" for run in every]
        store = redacted(store)
        raise UserError(f"{store}: no run {run_id!r}; there are: {', '.join(names[:_LISTED]) or 'none'}") from error
