"""Edits other than low-rank ones on disk: back bit by bit, and what is damaged is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.edits.sorts import SORTS, behaviour, equal, every_sort, same, slot_edit

from instructedit.edits import load_edit
from instructedit.errors import UserError


@every_sort
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choose", [lambda e: e, lambda e: e[1], lambda e: e[[2, 0]], lambda e: e.joined()])
def test_disk_and_back_is_bit_identical(sort, dtype, choose, tmp_path):
    edit = choose(SORTS[sort]()).to(dtype)
    edit.save_pretrained(tmp_path / "new" / "folder", base_model="tiny")
    again = load_edit(tmp_path / "new" / "folder")
    assert same(again, edit)
    for i in range(len(edit)):
        mine, theirs = (e.to(torch.float32) for e in (edit, again))
        assert equal(behaviour(mine, i), behaviour(theirs, i))
    card = json.loads((tmp_path / "new/folder/edit.json").read_text())
    assert (card["edit"], card["edits"], card["base_model"]) == (edit.name, len(edit), "tiny")


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_the_activation_is_saved(activation, tmp_path):
    slot_edit(activation=activation).save_pretrained(tmp_path)
    assert load_edit(tmp_path).activation == activation


@every_sort
@pytest.mark.parametrize("file", ["edit.json", "edit.safetensors"])
def test_missing_empty_and_cut_files_are_refused_by_name(sort, file, tmp_path):
    SORTS[sort]().save_pretrained(tmp_path)
    whole = (tmp_path / file).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-9], b"\xff\xfe\x00\x9c"):
        (tmp_path / file).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{tmp_path}: damaged edit"):
            load_edit(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"{tmp_path}: no saved edit here .*{file} is missing"):
        load_edit(tmp_path)


def saved_tensors(edit, folder):
    edit.save_pretrained(folder)
    return load_file(folder / "edit.safetensors")


@every_sort
def test_an_edit_without_one_of_its_tensors_is_refused(sort, tmp_path):
    tensors = saved_tensors(SORTS[sort](), tmp_path)
    for name in tensors:
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(left, tmp_path / "edit.safetensors")
        with pytest.raises(UserError, match=f"{tmp_path}: damaged"):
            load_edit(tmp_path)


@pytest.mark.parametrize("sort", ["slots", "codebook", "context alone", "dense"])
def test_a_card_of_another_sort_is_refused(sort, tmp_path):
    SORTS[sort]().save_pretrained(tmp_path)
    card = json.loads((tmp_path / "edit.json").read_text())
    for other in {"slots", "codebook", "context", "dense", "low_rank"} - {card["edit"]}:
        (tmp_path / "edit.json").write_text(json.dumps({**card, "edit": other}))
        with pytest.raises(UserError, match=f"{tmp_path}: damaged edit"):
            load_edit(tmp_path)


#: Tensors that do not belong together: sort, name, what it becomes.
MISMATCHES = {
    "a matrix less than the edits name": ("dense", "h.0.up:delta", lambda t: t[:2]),
    "an edit of no matrix": ("dense", "which", lambda t: t + 1),
    "edits named by fractions": ("dense", "which", lambda t: t.float()),
    "matrices that are none": ("dense", "h.0.up:delta", lambda t: t.flatten(1)),
    "values of fewer edits": ("slots", "h.0.up:values", lambda t: t[:2]),
    "a bias less": ("slots", "h.0.down:biases", lambda t: t[:, :1]),
    "a layer of fewer edits": ("slots", "h.0.up", lambda t: t[:2]),
    "no such activation": ("slots", "activation", lambda t: t + 9),
    "a key less": ("codebook", "h.0.up:keys", lambda t: t[:, :1]),
    "a label less": ("codebook", "h.0.up:labels", lambda t: t[:2]),
    "a radius less": ("codebook", "h.0.up:radii", lambda t: t[:2]),
    "a length less": ("context", "lengths", lambda t: t[:2]),
    "longer than it is": ("context", "lengths", lambda t: t + 9),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_tensors_that_do_not_belong_together_are_refused(name, tmp_path):
    sort, damaged, change = MISMATCHES[name]
    tensors = saved_tensors(SORTS[sort](), tmp_path)
    broken = {key: change(t) if key == damaged or key.startswith(f"{damaged}:") else t for key, t in tensors.items()}
    assert any(broken[k].dtype != t.dtype or not torch.equal(broken[k], t) for k, t in tensors.items())
    save_file({key: tensor.contiguous() for key, tensor in broken.items()}, tmp_path / "edit.safetensors")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_edit(tmp_path)


def test_an_activation_that_slots_do_not_have_is_refused():
    with pytest.raises(UserError, match="no activation 'tanh'; one of gelu, relu, silu"):
        slot_edit(activation="tanh")
