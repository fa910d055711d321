"""What SECURITY.md promises of files from strangers: nothing in them is run."""

from __future__ import annotations

import contextlib
import io
import os

import pytest
import torch
from safetensors.torch import load_file

import instructedit as ie
from instructedit.cli import main
from instructedit.testbed.pretrain import Recipe, new_model


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A small LM on disk."""
    recipe = Recipe(architecture="gpt2", width=16, layers=2, heads=2, vocab=600, context=128)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_weights_in_pickle_files_are_refused(folder):
    assert ie.FrozenLM.from_pretrained(str(folder)).width == 16
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ie.UserError, match=r"model\.safetensors"):
        ie.FrozenLM.from_pretrained(str(folder))


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    (folder / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    config = (folder / "config.json").read_text()
    own = '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own-kind",'
    (folder / "config.json").write_text(config.replace("{", own, 1).replace('"model_type": "gpt2"', '"kind": "gpt2"'))
    with pytest.raises(ie.UserError):
        ie.FrozenLM.from_pretrained(str(folder))
    with pytest.raises(ie.UserError, match="trust_remote_code"):  # no such option
        ie.FrozenLM.from_pretrained(str(folder), trust_remote_code=True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("where", ["hyper_parameters", "callbacks"])
def test_a_checkpoint_runs_nothing(folder, tmp_path, where):
    trap = tmp_path / "sprung"
    saved = {"state_dict": {}, "hyper_parameters": {"editor": {"class_path": "Mend"}}}
    torch.save(saved | {where: {"editor": Trap(trap)}}, tmp_path / "trap.ckpt")
    with pytest.raises(ie.UserError, match="not a checkpoint"):
        ie.load_editor(tmp_path / "trap.ckpt", ie.FrozenLM.from_pretrained(str(folder)))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        options = ("--model.editor=Mend", f"--model.lm.name={folder}", "--data.train=[{name: zsre}]")
        assert main(["test", *options, f"--ckpt_path={tmp_path}/trap.ckpt"]) == 2
    assert "not a checkpoint" in errors.getvalue()
    assert not trap.exists()
    torch.load(tmp_path / "trap.ckpt", weights_only=False)  # as whoever trusts the file would
    assert trap.exists()
