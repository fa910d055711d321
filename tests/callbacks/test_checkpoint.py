"""Checkpoints: the best is of what was validated, over the whole run; a file is whole or the one before it."""

from __future__ import annotations

import errno
import shutil
import warnings
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from torch.utils.data import DataLoader

from instructedit.callbacks import checkpoint
from instructedit.callbacks.checkpoint import Checkpoint, WholeFiles
from instructedit.errors import UserError


class Scored(L.LightningModule):
    """One weight; the validation scores are given by step."""

    def __init__(self, scores):
        super().__init__()
        self.weight, self.given = torch.nn.Parameter(torch.ones(())), scores

    def training_step(self, batch):
        return self.weight * batch.mean()

    def validation_step(self, batch):
        self.log("val/score", self.given[self.global_step])

    def train_dataloader(self):
        return DataLoader(torch.ones(100), batch_size=1)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, scores, steps, resume=None, every=None, validate=3):
    kept = Checkpoint(every_n_train_steps=every)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, callbacks=[kept], default_root_dir=folder,
        val_check_interval=validate, limit_val_batches=1, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Scored(scores), ckpt_path=resume)
    return kept, Path(folder, "checkpoints")


def steps_of(folder):
    return {file.stem: torch.load(file, weights_only=True)["global_step"] for file in folder.glob("*.ckpt")}


def test_the_best_is_of_a_step_that_was_validated(tmp_path):
    """A checkpoint every 2 steps lies between the validations at 3 and 6."""
    kept, folder = fit(tmp_path, {3: 1.0, 6: 5.0, 9: 4.0}, steps=9, every=2)
    assert steps_of(folder) == {"step-6": 6, "last": 9}
    assert (Path(kept.best_model_path).stem, float(kept.best_model_score)) == ("step-6", 5.0)


def test_a_last_state_is_kept_between_validations(tmp_path):
    _, folder = fit(tmp_path, {3: 1.0}, steps=4, every=2)
    assert steps_of(folder) == {"step-3": 3, "last": 4}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_remembers_the_best_score(tmp_path, elsewhere):
    _, folder = fit(tmp_path / "a", {3: 9.0}, steps=3)
    start = shutil.copy(folder / "last.ckpt", tmp_path / "start.ckpt")
    there = tmp_path / ("b" if elsewhere else "a")
    kept, own = fit(there, {6: 5.0, 9: 4.0}, 9, resume=start)
    assert (kept.best_model_path, float(kept.best_model_score)) == (str(folder / "step-3.ckpt"), 9.0)
    assert steps_of(own)["last"] == 9
    assert "step-6" not in steps_of(own)
    kept, own = fit(tmp_path / "c", {6: 10.0}, 6, resume=start)
    assert Path(kept.best_model_path) == own / "step-6.ckpt"
    assert (folder / "step-3.ckpt").is_file()  # of the other run, and so not thrown away


def test_a_best_checkpoint_that_is_gone_is_not_the_best(tmp_path):
    _, folder = fit(tmp_path, {3: 9.0}, steps=3)
    (folder / "step-3.ckpt").unlink()
    kept, _ = fit(tmp_path, {6: 5.0}, 6, resume=folder / "last.ckpt")
    assert Path(kept.best_model_path).stem == "step-6"


def test_a_run_that_is_killed_in_a_validation_validates_that_step_again(tmp_path):
    class Dies(dict):
        def __getitem__(self, step):
            raise KeyError(step)

    with pytest.raises(KeyError):
        fit(tmp_path, Dies(), 9, every=1)
    folder = tmp_path / "checkpoints"
    assert steps_of(folder) == {"last": 2}  # the step before the one that was to be validated
    kept, _ = fit(tmp_path, {3: 7.0}, 3, resume=folder / "last.ckpt", every=1)
    assert Path(kept.best_model_path).stem == "step-3"


# -- whole files ----------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, file)
    old = file.read_bytes()

    def full(value, opened):
        opened.write(b"half of i")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match=r"last\.ckpt: the checkpoint cannot be written \(No space left on device\)"):
        WholeFiles().save_checkpoint({"state_dict": {}}, file)
    assert file.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_kill_while_it_is_written_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, file)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", killed)  # all is written, nothing is sure to be on the disk
    with pytest.raises(KeyboardInterrupt):
        WholeFiles().save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    monkeypatch.undo()
    WholeFiles().save_checkpoint({"step": 3}, file)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_temporary_folder_is_not_used(tmp_path, monkeypatch):
    """It may be of another file system, from which a file comes piece by piece."""
    monkeypatch.setattr("tempfile.mkstemp", lambda *a, **k: pytest.fail("a file elsewhere"))
    _, folder = fit(tmp_path, {3: 1.0}, steps=3)
    assert steps_of(folder) == {"step-3": 3, "last": 3}
