"""Each way to be careful (`configs/debug/`) does what its file says, with Lightning's own loggers."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from instructedit.lightning_cli import run
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.paths import SHARED
from instructedit.training.module import EditingModule

DEBUG = sorted(file.stem for file in (SHARED / "configs" / "debug").glob("*.yaml"))


@pytest.fixture(scope="module")
def lm(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("debug") / "lm"
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fitted(lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fit(*more):
        quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
        small = ("--model.editor.rank=3", "--model.editor.edit_rate=0.1", "--data.batch_size=2", "--data.val_size=3")
        return run(["fit", "--scale=tiny", "--editor=mend", f"--model.lm.name={lm}", *small, *quiet, *more]).trainer

    return fit


def test_there_are_five():
    assert DEBUG == ["anomaly", "limit", "one-batch", "overfit", "profiler"]


def test_one_batch_leaves_nothing(fitted, tmp_path):
    trainer = fitted("--debug=one-batch")
    assert (trainer.global_step, trainer.fast_dev_run) == (1, 1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_limit_comes_to_an_end_with_another_logger(fitted, tmp_path):
    trainer = fitted("--debug=limit", "--logger=csv")
    assert trainer.global_step == 4
    (file,) = tmp_path.glob("outputs/lightning_logs/*/metrics.csv")
    metrics = pd.read_csv(file)
    assert metrics["val/score"].count() == 2
    assert metrics["train/loss"].count() == 4
    assert list(tmp_path.rglob("last.ckpt"))


def test_overfit_takes_one_batch_again_and_again(fitted, monkeypatch):
    seen = []
    step = EditingModule.training_step

    def training_step(self, batch, index):
        seen.append([record.id for record in batch.records])
        return step(self, batch, index)

    monkeypatch.setattr(EditingModule, "training_step", training_step)
    trainer = fitted("--debug=overfit", "--logger=none", "--trainer.max_steps=4")
    assert trainer.global_step == 4
    assert len(seen) == 4
    assert all(batch == seen[0] for batch in seen)


def test_anomalies_are_looked_for(fitted, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    trainer = fitted("--debug=anomaly", "--logger=none", "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    assert trainer._detect_anomaly
    assert torch.are_deterministic_algorithms_enabled()


def test_the_profiler_says_where_the_time_went(fitted):
    trainer = fitted("--debug=profiler", "--logger=none", "--trainer.max_steps=2")
    assert "run_training_batch" in trainer.profiler.summary()
