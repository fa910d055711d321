"""Tables, figures and files go to whatever logger a run has, as far as it can take them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure

from instructedit.artifacts import FolderArtifacts, artifacts
from instructedit.lightning_cli import run
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.tracking import MLflowTracker, artifact_path


class Plain(Logger):
    """A logger as a third party might write it."""

    name, version, save_dir = "runs", 3, None

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...


def keepers(*loggers, step=0):
    return artifacts(SimpleNamespace(loggers=loggers, global_step=step))


def everything(keeper, tmp_path):
    (tmp_path / "given/inner").mkdir(parents=True, exist_ok=True)
    (tmp_path / "given/inner/a.txt").write_text("a")
    keeper.log_table(pd.DataFrame({"x": [1, 2]}), "numbers")
    keeper.log_figure(Figure(), "empty")
    keeper.log_json([{"one": 1}], "data.fit")
    keeper.log_text("a: 1", "config.yaml")
    keeper.log_file(tmp_path / "given")
    keeper.log_file(tmp_path / "given/inner/a.txt", "areas")


FILES = {
    "areas/a.txt", "config.yaml", "data.fit.json", "figures/empty.png", "figures/empty.svg", "given/inner/a.txt",
    "tables/numbers.csv", "tables/numbers.parquet",
}  # fmt: skip


def files(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_holds_what_an_mlflow_run_holds(tmp_path):
    folder = FolderArtifacts(tmp_path / "folder")
    everything(folder, tmp_path)
    with MLflowTracker(root=tmp_path / "store") as tracker:
        (kept,) = keepers(tracker)
        assert kept is tracker
        everything(kept, tmp_path)
        assert all(each.has("config.yaml") for each in (kept, folder))
        assert not any(each.has("config.fit.yaml") for each in (kept, folder))
    store = artifact_path(tracker.run_id, "config.yaml", tmp_path / "store").parent
    assert files(folder.folder) == files(store) == FILES
    for name in FILES - {"figures/empty.png"}:
        assert (folder.folder / name).read_bytes() == (store / name).read_bytes()
    assert json.loads((store / "data.fit.json").read_text()) == [{"one": 1}]


def test_a_logger_with_a_folder_has_files_in_that_of_its_run(tmp_path):
    csv, other = CSVLogger(tmp_path), Plain()
    other.save_dir = str(tmp_path)
    first, second = keepers(csv, other)
    assert (str(first.folder), second.folder) == (csv.log_dir, tmp_path / "runs" / "version_3")


def test_a_logger_without_a_folder_is_named_once(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        assert keepers(Plain()) == keepers(Plain()) == keepers(DummyLogger()) == []
    said = [record.getMessage() for record in caplog.records if "has no folder" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("Plain has no folder: tables, figures and files are not kept")


def test_tensorboard_shows_figures(tmp_path, monkeypatch):
    shown = []
    writer = SimpleNamespace(add_figure=lambda *args, close: shown.append((*args, close)))
    monkeypatch.setattr(TensorBoardLogger, "__init__", lambda self: None)
    monkeypatch.setattr(TensorBoardLogger, "log_dir", str(tmp_path / "board"))
    monkeypatch.setattr(TensorBoardLogger, "experiment", writer)
    (keeper,) = keepers(TensorBoardLogger(), step=7)
    figure = Figure()
    keeper.log_figure(figure, "metrics")
    keeper.log_table(pd.DataFrame({"x": [1]}), "summary")
    assert shown == [("metrics", figure, 7, False)]
    assert files(tmp_path / "board") == {"tables/summary.parquet", "tables/summary.csv"}


@pytest.fixture(scope="module")
def lm(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifacts") / "lm"
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_whole_test_with_lightnings_csv_logger(lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--data.test=[{name: counterfact, size: 6}]", "--model.evaluation.generate=false")
    quiet = ("--trainer.enable_progress_bar=false", "--results.show=false", "--model.evaluation.fluency_tokens=0")
    options = (f"--model.lm.name={lm}", "--trainer.accelerator=cpu", "--logger=csv", *small, *quiet)
    run(["test", "--scale=tiny", "--editor=rome", *options])
    (folder,) = tmp_path.glob("outputs/lightning_logs/*")
    kept = files(folder)
    tables = {"tables/probes.parquet", "tables/summary.parquet", "areas/areas.safetensors"}
    figures = {f"figures/{name}.{suffix}" for name in ("metrics", "areas") for suffix in ("png", "svg")}
    assert kept >= tables | figures | {"config.yaml", "data.test.json", "fingerprints.json"}
    summary = pd.read_parquet(folder / "tables/summary.parquet").set_index("metric")["mean"]
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics["test/counterfact/reliability.exact"].dropna().item() == pytest.approx(summary["reliability.exact"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["editor"]["class_path"].endswith("Rome")
    (report,) = json.loads((folder / "data.test.json").read_text())
    assert json.loads((folder / "fingerprints.json").read_text()) == {"counterfact/test": report["fingerprint"]}
