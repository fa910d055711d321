"""Where a model's files are, and reading them safely: safetensors only, no remote code, a dtype that is asked for."""

from __future__ import annotations

import importlib.util
import logging as python_logging
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from instructedit.errors import UserError

#: Embedded models: name → folder beside this file.
EMBEDDED = {"tiny": "tiny-gpt2", "tiny-llama": "tiny-llama"}


def load_model(
    name: str,
    dtype: str = "float32",
    revision: str | None = None,
    quantize: Literal["8bit", "4bit"] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with its tokenizer.

    Args:
        name: An embedded model, a local folder, or a hub id.
        dtype: ``float32``, ``bfloat16``, …
        revision: Branch, tag or commit on the hub.
        quantize: Pack the blocks' linear layers while they are read: ``8bit`` (LLM.int8, Dettmers et al. 2022a) or
            ``4bit`` (NF4, Dettmers et al. 2023).
        device: Where they are packed; other models are read to the CPU.

    Raises:
        UserError: If there is no such model or dtype, its files cannot be read, or they cannot be packed.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}; for instance float32, bfloat16, float16")
    source = _source(name)
    packing = {} if quantize is None else _packing(quantize, kind, device)
    if name in EMBEDDED:  # too quick for a progress bar
        logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, revision=revision, use_safetensors=True, trust_remote_code=False, **packing
        )
    except Exception as error:  # transformers and safetensors each raise their own
        raise _unreadable(name, error) from error
    finally:
        logging.enable_progress_bar()
    tokenizer = load_tokenizer(name, revision)
    _keep_differentiable(model)
    return model, tokenizer


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a causal LM, without its weights (arguments as for `load_model`).

    Raises:
        UserError: If there is none, its files cannot be read, or it knows no character offsets.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(name), revision=revision, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers each raise their own
        raise _unreadable(name, error) from error
    if not tokenizer.is_fast:
        raise UserError(f"model {name!r}: its tokenizer knows no character offsets (a fast tokenizer is needed)")
    return tokenizer


def _source(name: str) -> str:
    """What transformers is asked for: a folder or a hub id.

    Raises:
        UserError: If it can be neither.
    """
    source = str(Path(__file__).parent / EMBEDDED[name]) if name in EMBEDDED else name
    local = Path(source).expanduser()
    if not local.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        known = ", ".join(EMBEDDED)
        raise UserError(f"no model {name!r}: neither embedded ({known}), nor a local folder, nor a hub id owner/name")
    if local.exists() and not (local / "config.json").is_file():
        raise UserError(f"{source}: no model here (config.json is missing)")
    return source


def _unreadable(name: str, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), "")
    return UserError(f"model {name!r} cannot be loaded: {type(error).__name__}: {reason}")


def _packing(quantize: str, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What transformers must be told so that it packs the weights.

    Raises:
        UserError: If it is no way to pack them, or what does so is not installed.
    """
    from transformers import BitsAndBytesConfig

    options: dict[str, dict[str, Any]] = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }
    if quantize not in options:
        raise UserError(f"unknown quantize {quantize!r}; one of {', '.join(options)}")
    if missing := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"quantize={quantize!r} needs {' and '.join(missing)}, which is not installed: "
            "pip install 'instructedit[quantize]'"
        )
    # It says once a call that it rounds its inputs to float16, which is how it works.
    python_logging.getLogger("bitsandbytes.autograd._functions").setLevel(python_logging.ERROR)
    return {"quantization_config": BitsAndBytesConfig(**options[quantize]), "device_map": {"": str(device)}}


def _keep_differentiable(model: PreTrainedModel) -> None:
    """On some CPUs, layers of 4 bits repack themselves at the first pass without gradients, and then give none."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute of every module)
