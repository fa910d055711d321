"""The MLflow store: its layout, what a run leaves there however it ends, and reading it back."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import Tensor
from torch.utils.data import DataLoader

from instructedit import stores
from instructedit.errors import UserError
from instructedit.tracking import MLflowTracker, SaveConfig, artifact_path, load_table, runs


class Toy(LightningModule):
    """One weight.

    Args:
        size: Width of the layer.
        note: Some text.
    """

    def __init__(self, size: int = 2, note: str = "short") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(size, 1)
        self.error: BaseException | None = None

    def training_step(self, batch: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        loss: Tensor = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch: Tensor) -> None:
        self.log("test/value", batch.mean())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([torch.ones(self.hparams["size"])] * 4)  # type: ignore[arg-type]  # a list will do

    test_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    stores.make_database(file)
    return file


@pytest.fixture
def root(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test's own, below an empty working directory."""
    monkeypatch.chdir(tmp_path)
    # Set before the tracker sets it, so that it is taken away afterwards.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    folder = tmp_path / "some folder" / "mlruns"
    folder.mkdir(parents=True)
    shutil.copy(empty_store, folder)
    return folder


@pytest.fixture
def restored_signals() -> Iterator[None]:
    """Lightning stops listening to Ctrl-C once it was pressed."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def trainer(tracker: MLflowTracker) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=tracker,
        max_steps=2,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def stored(root: Path, run_id: str | None) -> Run:
    assert run_id is not None
    return MlflowClient(f"sqlite:///{root}/mlflow.db").get_run(run_id)


def test_a_fit_leaves_params_metrics_tags_and_checkpoints(root: Path, tmp_path: Path) -> None:
    tracker = MLflowTracker(run_name="first", root=root, tags={"purpose": "test"})
    long = "x" * 7000
    trainer(tracker).fit(Toy(note=long))

    run = stored(root, tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {"size": "2", "note": long[:6000]}
    assert run.data.metrics["train/loss"] >= 0
    assert run.data.tags["purpose"] == "test"
    assert run.data.tags["provenance.torch"] == torch.__version__
    assert run.info.artifact_uri == (root / "artifacts/instructedit" / str(tracker.run_id) / "artifacts").as_uri()
    assert len(list((root / str(tracker.experiment_id) / str(tracker.run_id) / "checkpoints").glob("*.ckpt"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [root.parent.name]  # nothing in the working directory


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_store_is_made_where_there_is_none(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    made: list[Path] = []

    def migrate(file: Path) -> None:
        made.append(file)
        shutil.copy(empty_store, file)

    def refuse(*_: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(stores, "make_database", migrate)
    monkeypatch.chdir(tmp_path)
    if not hard_links:
        monkeypatch.setattr("os.link", refuse)
    assert MLflowTracker().save_dir == str(tmp_path / "mlruns")
    assert MLflowTracker().save_dir == str(tmp_path / "mlruns")
    assert [path.name for path in (tmp_path / "mlruns").iterdir()] == ["mlflow.db"]
    assert len(made) == 1
    assert made[0].parent.parent == tmp_path / "mlruns"  # a broken-off migration leaves no store


def test_of_two_first_runs_at_once_the_first_store_stays(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "mlruns"

    def migrate_second(file: Path) -> None:
        shutil.copy(empty_store, file)
        shutil.copy(empty_store, root / "mlflow.db")
        MlflowClient(f"sqlite:///{root}/mlflow.db").create_experiment("theirs")

    with monkeypatch.context() as patch:
        patch.setattr(stores, "make_database", migrate_second)
        MLflowTracker(root=root)
    assert runs("theirs", root).empty


def test_a_server_leaves_nothing_local(tmp_path: Path) -> None:
    tracker = MLflowTracker(root=tmp_path / "mlruns", tracking_uri="http://localhost:1")
    assert tracker.save_dir == str(tmp_path / "mlruns")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize(
    ("error", "seen", "status"),
    [
        (RuntimeError("out of luck"), RuntimeError, "FAILED"),
        (KeyboardInterrupt(), SystemExit, "KILLED"),
        (SIGTERMException(), SIGTERMException, "KILLED"),
    ],
)
def test_a_run_that_breaks_off_says_how(
    root: Path, error: BaseException, seen: type[BaseException], status: str
) -> None:
    tracker, model = MLflowTracker(root=root), Toy()
    model.error = error
    with pytest.raises(seen):
        trainer(tracker).fit(model)
    assert stored(root, tracker.run_id).info.status == status


@pytest.mark.usefixtures("restored_signals")
def test_an_interrupted_fit_stays_killed_inside_a_with(root: Path) -> None:
    model = Toy()
    model.error = KeyboardInterrupt()
    with pytest.raises(SystemExit), MLflowTracker(root=root) as tracker:
        trainer(tracker).fit(model)
    assert stored(root, tracker.run_id).info.status == "KILLED"


def test_without_a_trainer_the_with_block_ends_the_run(root: Path) -> None:
    with MLflowTracker(root=root) as tracker:
        assert stored(root, tracker.run_id).info.status == "RUNNING"
        tracker.log_metrics({"a": 1.0})
    assert stored(root, tracker.run_id).info.status == "FINISHED"
    with pytest.raises(OSError, match="no disk"), MLflowTracker(root=root) as tracker:
        raise OSError("no disk")
    assert stored(root, tracker.run_id).info.status == "FAILED"


def test_a_run_that_nobody_ended_fails_when_the_process_exits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    tracker = MLflowTracker(root=root)
    tracker.log_metrics({"a": 1.0})
    with MLflowTracker(root=root) as ended:
        pass
    for act in at_exit:
        act()
    assert stored(root, tracker.run_id).info.status == "FAILED"
    assert stored(root, ended.run_id).info.status == "FINISHED"


def test_a_test_in_the_run_of_its_fit_keeps_the_first_values(root: Path) -> None:
    tracker = MLflowTracker(root=root, tags={"purpose": "one"})
    trainer(tracker).fit(Toy())
    again = MLflowTracker(root=root, run_id=tracker.run_id, tags={"purpose": "two", "more": "three"})
    trainer(again).test(Toy(size=3), verbose=False)

    run = stored(root, tracker.run_id)
    assert again.run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert (run.data.params["size"], run.data.tags["changed.size"]) == ("2", "3")
    assert (run.data.tags["purpose"], run.data.tags["changed.purpose"]) == ("one", "two")
    assert run.data.tags["more"] == "three"
    assert {"train/loss", "test/value"} <= run.data.metrics.keys()
    assert {tag for tag in run.data.tags if tag.startswith("changed.")} == {"changed.size", "changed.purpose"}


def test_parameters_beyond_one_batch_without_the_noise(root: Path) -> None:
    with MLflowTracker(root=root) as tracker:
        tracker.log_hyperparams({"many": {f"p{i}": i for i in range(230)}, "_instantiator": "lightning"})
        tracker.log_hyperparams({"many": {f"p{i}": -i for i in range(230)}, "data": {"_instantiator": "lightning"}})
    run = stored(root, tracker.run_id)
    assert run.data.params == {f"many/p{i}": str(i) for i in range(230)}
    assert run.data.tags["changed.many/p229"] == "-229"
    assert "changed.many/p0" not in run.data.tags


def test_fingerprints_of_the_data(root: Path) -> None:
    with MLflowTracker(root=root) as tracker:
        tracker.log_fingerprints({"counterfact/train": "ab12", "zsre/test": "cd34"})
        with pytest.warns(UserWarning, match=r"data\.counterfact/train: the run began with other data \(sha256 ab12\)"):
            tracker.log_fingerprints({"counterfact/train": "ef56"})
    tags = stored(root, tracker.run_id).data.tags
    assert (tags["data.counterfact/train"], tags["data.zsre/test"]) == ("ab12", "cd34")
    assert tags["changed.data.counterfact/train"] == "ef56"


def test_tables_figures_files_and_json_come_back(root: Path, tmp_path: Path) -> None:
    table = pd.DataFrame({"record": [1, 2], "score": [0.5, float("nan")], "answer": ["Lyon", None], "ids": [[1], []]})
    figure = Figure()
    figure.subplots().plot([1, 2])
    (tmp_path / "areas").mkdir()
    (tmp_path / "areas" / "a.bin").write_bytes(b"\x00\x01")
    with MLflowTracker(root=root) as tracker:
        tracker.log_table(table, "test/counterfact")
        tracker.log_figure(figure, "areas")
        tracker.log_file(tmp_path / "areas" / "a.bin", "dumps")
        tracker.log_file(tmp_path / "areas")
        tracker.log_json({"a": [1, None]}, "summary")

    moved = root.parent / "moved"
    shutil.move(root, moved)
    run_id = str(tracker.run_id)
    back = load_table(run_id, "test/counterfact", moved)
    pd.testing.assert_frame_equal(back.drop(columns="ids"), table.drop(columns="ids"))
    assert [list(ids) for ids in back["ids"]] == [[1], []]
    assert artifact_path(run_id, "figures/areas.png", moved).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in artifact_path(run_id, "figures/areas.svg", moved).read_text()
    assert artifact_path(run_id, "dumps/a.bin", moved).read_bytes() == b"\x00\x01"
    assert (artifact_path(run_id, "areas", moved) / "a.bin").is_file()
    assert json.loads(artifact_path(run_id, "summary.json", moved).read_text()) == {"a": [1, None]}


def test_runs_lists_the_newest_first_with_their_parents(root: Path) -> None:
    with MLflowTracker("grid/one", "parent", root=root) as parent:
        child = MLflowTracker("grid/one", "child", root=root, parent_run_id=parent.run_id)
        trainer(child).fit(Toy(size=5))
    MLflowTracker("other", root=root).finalize()  # never started: no run

    table = runs("grid/one", root)
    assert list(table.columns[:6]) == ["run_id", "name", "status", "parent", "params.note", "params.size"]
    assert all(column.startswith("metrics.") for column in table.columns[6:])
    assert list(table["name"]) == ["child", "parent"]
    assert list(table["status"]) == ["FINISHED", "FINISHED"]
    rows = table.set_index("name")
    assert rows.loc["child", "parent"] == parent.run_id
    assert list(table["parent"].isna()) == [False, True]
    assert rows.loc["child", "params.size"] == "5"
    assert isinstance(rows.loc["child", "metrics.train/loss"], float)


def test_an_experiment_without_runs_is_an_empty_table(root: Path) -> None:
    MlflowClient(f"sqlite:///{root}/mlflow.db").create_experiment("empty")
    assert list(runs("empty", root).columns) == ["run_id", "name", "status", "parent"]
    assert runs("empty", root).empty


def test_what_is_not_there_is_one_line_that_says_what_is(root: Path, tmp_path: Path) -> None:
    with MLflowTracker(run_name="only", root=root) as tracker:
        tracker.log_table(pd.DataFrame({"a": [1]}), "edits")
    run_id = str(tracker.run_id)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: runs(root=tmp_path / "nowhere"), "nowhere: no MLflow store"),
        (lambda: load_table(run_id, "edits", tmp_path / "nowhere"), "nowhere: no MLflow store"),
        (lambda: runs("nope", root), "no experiment 'nope'; there are: instructedit, Default"),
        (lambda: load_table("nope", "edits", root), rf"no run 'nope'; there are: {run_id} \(only\)"),
        (
            lambda: load_table(run_id, "nope", root),
            "no artifact 'tables/nope.parquet'; there are: tables/edits.csv, tables/edits.parquet",
        ),
        (lambda: MLflowTracker(root=root, run_id="nope").experiment, "no run 'nope'"),
    ]
    for act, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


def test_other_ranks_log_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = MLflowTracker(root=root)
    tracker.log_hyperparams({"a": 1})
    tracker.log_fingerprints({"a": "b"})
    tracker.log_table(pd.DataFrame({"a": [1]}), "a")
    tracker.log_figure(Figure(), "a")
    tracker.log_file("nowhere")
    tracker.log_json({}, "a")
    with tracker:
        assert tracker.run_id is None
    assert tracker.save_dir == str(root)
    with pytest.raises(UserError, match="there are: Default"):
        runs(root=root)


def cli(root: Path, command: str, *arguments: str) -> LightningCLI:
    logger = [f"--trainer.logger={MLflowTracker.__module__}.MLflowTracker", f"--trainer.logger.root={root}"]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_steps": 1}
    return LightningCLI(
        Toy,
        args=[command, *logger, *arguments],
        save_config_callback=SaveConfig,
        trainer_defaults={**quiet, "logger": None},
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_line_logs_its_whole_configuration(root: Path, tmp_path: Path) -> None:
    first = cli(root, "fit", "--model.size=3").trainer.logger
    assert isinstance(first, MLflowTracker)
    run_id = str(first.run_id)
    config = artifact_path(run_id, "config.yaml", root)
    assert "size: 3" in config.read_text()
    assert "max_steps: 1" in config.read_text()
    assert "max_time: null" in config.read_text()
    assert stored(root, run_id).data.params == {"size": "3", "note": "short"}

    shutil.copy(config, tmp_path / "again.yaml")
    second = cli(root, "fit", f"--config={tmp_path / 'again.yaml'}").trainer.logger  # a second run in the same store
    assert isinstance(second, MLflowTracker)
    assert stored(root, second.run_id).data.params["size"] == "3"

    cli(root, "test", "--model.size=4", f"--trainer.logger.run_id={run_id}")  # in the first run
    assert "size: 3" in config.read_text()
    assert "size: 4" in artifact_path(run_id, "config.test.yaml", root).read_text()

    cli(root, "fit", "--trainer.fast_dev_run=true")
    assert len(runs(root=root)) == 2
