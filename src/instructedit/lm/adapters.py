"""Whether PEFT makes of a saved adapter what the edit is: it maps names of modules in its own way."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instructedit.lm import tryout


def reads_back(model: PreTrainedModel, folder: Path, expected: Tensor) -> bool:
    """Whether PEFT reads an adapter to the logits that are expected of `tryout.inputs`; taken for granted without PEFT.

    The model gets the adapter and loses it again: no copy of it is made.

    Args:
        model: The base model.
        folder: Of the adapter.
        expected: Logits of the edited model.
    """
    if importlib.util.find_spec("peft") is None:
        return True
    with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
        warnings.simplefilter("ignore")  # what it cannot place shows in the logits
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(folder))
        try:
            found = adapted(**tryout.inputs(model)).logits
        finally:
            adapted.unload()
            vars(model).pop("peft_config", None)
    return tryout.close(found, expected)
