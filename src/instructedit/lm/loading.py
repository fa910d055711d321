"""Where a model's files are, and reading them safely: safetensors only, no remote code, a dtype that is asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from instructedit.errors import UserError

#: Embedded models: name → folder beside this file.
EMBEDDED = {"tiny": "tiny-gpt2", "tiny-llama": "tiny-llama"}


def load_model(
    name: str, dtype: str = "float32", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with its tokenizer.

    Args:
        name: An embedded model, a local folder, or a hub id.
        dtype: ``float32``, ``bfloat16``, …
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: If there is no such model or dtype, or its files cannot be read.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}; for instance float32, bfloat16, float16")
    source = str(Path(__file__).parent / EMBEDDED[name]) if name in EMBEDDED else name
    local = Path(source).expanduser()
    if not local.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        known = ", ".join(EMBEDDED)
        raise UserError(f"no model {name!r}: neither embedded ({known}), nor a local folder, nor a hub id owner/name")
    if local.exists() and not (local / "config.json").is_file():
        raise UserError(f"{source}: no model here (config.json is missing)")
    if name in EMBEDDED:  # too quick for a progress bar
        logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, revision=revision, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"model {name!r} cannot be loaded: {type(error).__name__}: {reason}") from error
    finally:
        logging.enable_progress_bar()
    if not tokenizer.is_fast:
        raise UserError(f"model {name!r}: its tokenizer knows no character offsets (a fast tokenizer is needed)")
    return model, tokenizer
