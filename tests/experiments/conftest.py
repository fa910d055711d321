"""The repository of `helpers`, made once."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.experiments.helpers import GRID, PAPER, SCALE, write

from instructedit import paths
from instructedit.testbed.pretrain import Recipe, new_model


@pytest.fixture(scope="session")
def made(tmp_path_factory, tokenizer):
    """A repository with one experiment for a small random LM."""
    root = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    data = {
        "train": [{"name": "counterfact"}],
        "test": [{"name": "counterfact", "size": 4}, {"name": "zsre", "size": 3}],
        "batch_size": 2,
        "val_size": 2,
    }
    off = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    write(root / "configs/all.yaml", {"data": data})
    write(root / "configs/scale/one.yaml", SCALE)
    write(root / "configs/trainer/short.yaml", {"trainer": {"accelerator": "cpu", "log_every_n_steps": 1, **off}})
    write(root / "configs/lm/one.yaml", {"model": {"lm": {"name": str(root / "lm")}}})
    mend = {"model": {"editor": {"class_path": "Mend", "init_args": {"rank": 3, "edit_rate": 0.1}}}}
    write(root / "configs/editor/mend.yaml", {"model": {"lr": 1.0, **mend["model"]}})
    write(root / "configs/editor/small/mend.yaml", mend)
    ft_l = {"class_path": "FtL", "init_args": {"steps": 1, "lr": 0.01, "bound": 0.01}}
    write(root / "configs/editor/ft_l.yaml", {"model": {"editor": ft_l}})
    write(root / "configs/editor/unedited.yaml", {"model": {"editor": {"class_path": "Unedited"}}})
    write(root / "experiments/try/grid.yaml", GRID)
    write(root / "experiments/try/paper.csv", PAPER)
    return root


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.setattr(paths, "SHARED", made)
    return made


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """One whose files a test may change."""
    shutil.copytree(made / "configs", tmp_path / "configs")
    shutil.copytree(made / "experiments", tmp_path / "experiments")
    monkeypatch.setattr(paths, "SHARED", tmp_path)
    return tmp_path
