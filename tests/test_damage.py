"""Saved editors, edits and checkpoints that are damaged at rest are refused, and what they name is never imported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import random_lm

import instructedit as ie
from instructedit.cli import main
from instructedit.editors.saved import check_checkpoint, seal_checkpoint
from instructedit.edits import DenseEdit

REQUEST = ie.EditRequest("The capital of France is", "Rome")


@pytest.fixture(scope="module")
def small(tokenizer):
    return random_lm("gpt2", tokenizer)


@pytest.fixture
def saved(small, tmp_path):
    """An editor, an edit of it, and a checkpoint: (file of tensors, what reads it)."""
    editor = ie.build_editor("mend", small, rank=2)
    editor.save_pretrained(tmp_path / "editor")
    editor.edit([REQUEST]).save_pretrained(tmp_path / "edit")
    state = {f"editor.{name}": value for name, value in editor.state_dict().items()}
    config = {"class_path": "instructedit.editors.mend.Mend", "init_args": editor.options()}
    momentum = [{"state": {0: {"exp_avg": torch.ones(3)}}}]
    checkpoint = {"state_dict": state, "hyper_parameters": {"editor": config}, "optimizer_states": momentum}
    checkpoint["pytorch-lightning_version"] = "2.6.0"
    seal_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    return {
        "editor": (tmp_path / "editor/editor.safetensors", lambda: ie.load_editor(tmp_path / "editor", small)),
        "edit": (tmp_path / "edit/edit.safetensors", lambda: ie.load_edit(tmp_path / "edit")),
        "checkpoint": (tmp_path / "last.ckpt", lambda: ie.load_editor(tmp_path / "last.ckpt", small)),
    }


def flipped(file, place):
    """One bit of a file turned round."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["editor", "edit", "checkpoint"])
def test_a_flipped_bit_is_noticed(saved, kind):
    file, read = saved[kind]
    read()
    content = file.read_bytes()
    # a bit of the data: in the middle of the file, or of the first tensor that the archive holds
    flipped(file, len(content) // 2 if kind != "checkpoint" else content.index(b"data/0") + 200)
    with pytest.raises(ie.UserError, match=r"damaged.*checksum"):
        read()


@pytest.mark.parametrize("kind", ["editor", "edit", "checkpoint"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_no_number_is_refused_without_a_checksum_too(saved, kind, value):
    file, read = saved[kind]
    if kind == "checkpoint":
        content = torch.load(file, weights_only=True)
        del content["sha256"]
        content["state_dict"]["editor.log_alpha"][0] = value
        torch.save(content, file)
    else:
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] = value
        save_file(tensors, file)
        card = file.with_suffix(".json")
        card.write_text(json.dumps({k: v for k, v in json.loads(card.read_text()).items() if k != "sha256"}))
    with pytest.raises(ie.UserError, match=f"{file.name if kind == 'checkpoint' else file.parent.name}.*holds NaN"):
        read()


def test_edits_that_are_not_low_rank_too(tmp_path):
    DenseEdit.of({"site": torch.ones(1, 3, 2)}).save_pretrained(tmp_path)
    flipped(tmp_path / "edit.safetensors", -1)
    with pytest.raises(ie.UserError, match="damaged"):
        ie.load_edit(tmp_path)


def test_damage_of_the_optimiser_is_noticed_on_resuming():
    checkpoint = {"state_dict": {"w": torch.ones(2)}, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}
    check_checkpoint(checkpoint, "old")  # of an older version
    seal_checkpoint(checkpoint)
    check_checkpoint(checkpoint, "whole")
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][1] = 2
    with pytest.raises(ie.UserError, match="bent: damaged"):
        check_checkpoint(checkpoint, "bent")


@pytest.mark.parametrize("name", ["own_trap.Mend2", "own_trap", "os.system"])
def test_a_checkpoint_imports_nothing(saved, small, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "own_trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    file, read = saved["checkpoint"]
    content = torch.load(file, weights_only=True)
    content["hyper_parameters"]["editor"]["class_path"] = name
    torch.save(content, file)
    with pytest.raises(ie.UserError, match="unknown editor"):
        read()
    options = ["--model.editor=Mend", "--model.lm.name=tiny", "--data.train=[{name: zsre}]"]
    assert main(["test", *options, "--ckpt_path=last.ckpt"]) == 2
    assert "unknown editor" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_a_class_of_the_same_name_elsewhere_is_the_packages_own(saved, small, tmp_path):
    file, read = saved["checkpoint"]
    content = torch.load(file, weights_only=True)
    content["hyper_parameters"]["editor"]["class_path"] = "old.place.of.Mend"
    torch.save(content, file)
    assert read().name == "mend"
