"""Edits in the weights of a copy of the model, and in files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instructedit.edits import ADAPTER, Edit
from instructedit.errors import UserError
from instructedit.lm import adapters, tryout
from instructedit.lm.sites import add_to_weight, dense_weight

if TYPE_CHECKING:
    from instructedit.lm.frozen import FrozenLM


def merge(lm: FrozenLM, edit: Edit) -> PreTrainedModel:
    """Puts an edit into the weights of a copy of the plain model (see `FrozenLM.merge`)."""
    if len(edit) != 1:
        raise UserError(f"merge takes one edit, got {len(edit)}: choose edit[i], or all of them by edit.joined()")
    if not edit.is_weights:
        raise UserError(f"merge: an edit of the sort {edit.name!r} is no change of weights; it can only be worn")
    lm.first_block(edit.sites)
    sites = [site for site in lm.select(every=True) if site.name in edit.sites]
    for site in sites:  # before a copy is made
        dense_weight(lm.model.get_submodule(site.name), site)
    # Some models keep states of the last text in their modules, with the graph that made them.
    kept = [t for module in lm.model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    model = copy.deepcopy(lm.model, {id(tensor): tensor.detach().clone() for tensor in kept})
    for site in sites:
        change = edit.delta(site.name)[0]
        if tuple(change.shape) != (expected := tuple(reversed(site.shape))):
            raise UserError(
                f"{lm.name}: the edit's {site.name} is {tuple(change.shape)}, the model's {expected}: of another model?"
            )
        add_to_weight(model.get_submodule(site.name), site, change)
    return model


def save(lm: FrozenLM, edit: Edit, folder: str | Path) -> None:
    """Writes an edit, and where PEFT reads it back its adapter, to a folder (see `FrozenLM.save`)."""
    lm.first_block(edit.sites)  # refuses an edit of another model
    edit.save_pretrained(folder, base_model=lm.source, lm=lm.name)
    written = [file for name in ADAPTER if (file := Path(folder) / name).is_file()]
    if not written:
        return
    with torch.no_grad(), lm.applied.at_layers(edit, None):
        expected = lm.model(**tryout.inputs(lm.model)).logits
    if not adapters.reads_back(lm.model, Path(folder), expected):
        for file in written:
            file.unlink()
        warnings.warn(
            f"{folder}: saved for instructedit alone, without a LoRA adapter: PEFT would put it on other layers of "
            f"{type(lm.model).__name__}",
            stacklevel=3,
        )
