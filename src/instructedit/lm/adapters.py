"""A check that PEFT restores the same edit from a saved adapter, since it maps module names in its own way."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instructedit.lm import tryout


def reads_back(model: PreTrainedModel, folder: Path, expected: Tensor) -> bool:
    """True if PEFT loads an adapter to the expected logits on `tryout.inputs`; assumed True if PEFT is not installed.

    The adapter is attached to the model and removed again, so no copy of the model is made.

    Args:
        model: The base model.
        folder: Folder of the adapter.
        expected: Logits of the edited model.
    """
    if importlib.util.find_spec("peft") is None:
        return True
    with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
        warnings.simplefilter("ignore")  # weights that it cannot place show up in the logits
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(folder))
        try:
            found = adapted(**tryout.inputs(model)).logits
        finally:
            adapted.unload()
            vars(model).pop("peft_config", None)
    return tryout.close(found, expected)
