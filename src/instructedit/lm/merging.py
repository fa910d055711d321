"""Merging edits into the weights of a copy of the model, and saving them to files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instructedit.edits import ADAPTER, Edit
from instructedit.errors import UserError
from instructedit.lm import adapters, tryout
from instructedit.lm.applied import Applied
from instructedit.lm.loading import source_of
from instructedit.lm.sites import add_to_weight, dense_weight


def merge(applied: Applied, edit: Edit) -> PreTrainedModel:
    """Puts an edit into the weights of a copy of the plain model.

    Args:
        applied: Knows the model's edit sites.
        edit: One edit; several must be merged into one first.

    Raises:
        UserError: If there is more than one, the edit is not a change of weights, or not of linear layers, the weights
            are packed, or an edit is applied to the model: the copy would have it too.
    """
    if len(edit) != 1:
        raise UserError(f"merge takes one edit, got {len(edit)}: choose edit[i], or all of them by edit.joined()")
    if not edit.is_weights:
        raise UserError(f"merge: an edit of the kind {edit.name!r} is no change of weights; it can only be applied")
    if applied.layers:
        raise UserError("an edit is applied to the model: merge outside of `edited`")
    own = applied.sites
    own.first_block(edit.sites)
    plain = own.forward.model
    sites = [site for site in own.select(every=True) if site.name in edit.sites]
    if others := set(edit.sites) - {site.name for site in sites}:
        raise UserError(f"merge: {own.name}'s {min(others)} is no linear layer; the edit can only be applied")
    for site in sites:  # before a copy is made
        dense_weight(plain.get_submodule(site.name), site)
    # Some models keep states of the last text in their modules, with the graph that made them.
    kept = [t for module in plain.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    model = copy.deepcopy(plain, {id(tensor): tensor.detach().clone() for tensor in kept})
    for site in sites:
        change = edit.delta(site.name)[0]
        if tuple(change.shape) != (expected := tuple(reversed(site.shape))):
            found = f"{own.name}: the edit's {site.name} is {tuple(change.shape)}"
            raise UserError(f"{found}, the model's {expected}: of another model?")
        add_to_weight(model.get_submodule(site.name), site, change)
    return model


def save(applied: Applied, edit: Edit, folder: str | Path) -> None:
    """Writes an edit of a model to a folder, for `load_edit`; a single low-rank one also as a LoRA adapter.

    The adapter is read back by PEFT, if that is installed. It is left out, with a warning, if PEFT would turn it into
    something else (it maps the names of some layers to those of fused experts).
    """
    model = applied.forward.model
    applied.sites.first_block(edit.sites)  # refuses an edit of another model
    edit.save_pretrained(folder, base_model=source_of(model), lm=applied.sites.name)
    written = [file for name in ADAPTER if (file := Path(folder) / name).is_file()]
    if not written:
        return
    with applied.suspended():
        with torch.no_grad(), applied.at_layers(edit, None):
            expected = model(**tryout.inputs(model)).logits
        restored = adapters.reads_back(model, Path(folder), expected)
    if not restored:
        for file in written:
            file.unlink()
        warnings.warn(
            f"{folder}: saved for instructedit alone, without a LoRA adapter: PEFT would put it on other layers of "
            f"{type(model).__name__}",
            stacklevel=3,
        )
