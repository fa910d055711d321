"""Reading a model's files safely: safetensors or GGUF, no remote code, no weight missing or made up."""

from __future__ import annotations

import importlib.util
import logging as python_logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from instructedit.errors import UserError
from instructedit.lm import gguf


@dataclass(frozen=True)
class Loading:
    """Options for reading a model's files; all but `quantize` have their names and meaning from transformers.

    Attributes:
        dtype: Dtype of its weights and forward pass, whatever the files hold: ``float32``, ``bfloat16``, ``float16``.
            It does not depend on ``--trainer.precision``, which is the editor's.
        revision: Branch, tag or commit on the hub.
        gguf_file: Name of a GGUF file in the folder or hub repository; its weights are unpacked.
        attn_implementation: How attention is computed: ``eager``, ``sdpa``, ``flash_attention_2``, …; by default
            transformers chooses.
        device_map: Where the parts of the model go: ``auto``, a device, or module → device. It then stays there.
        quantize: Pack the weights of its linear layers in ``8bit`` (LLM.int8, Dettmers et al. 2022a) or ``4bit`` (NF4,
            Dettmers et al. 2023); needs the extra ``quantize``.
    """

    dtype: str = "float32"
    revision: str | None = None
    gguf_file: str | None = None
    attn_implementation: str | None = None
    device_map: str | dict[str, int | str] | None = None
    quantize: Literal["8bit", "4bit"] | None = None


#: The default options.
PLAIN = Loading()


def read_model(
    source: str, options: Loading = PLAIN, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Reads a causal LM with its tokenizer.

    Args:
        source: A local folder or a hub id.
        options: Options for reading it.
        device: Device on which it is packed (`quantize`); other models are read to the CPU.

    Raises:
        UserError: If the files cannot be read, are not those of a causal LM, or lack or exceed its weights.
    """
    dtype = _dtype(options.dtype)
    chosen: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
    chosen |= {name: value for name in ("attn_implementation", "device_map") if (value := getattr(options, name))}
    if options.quantize is not None:
        chosen |= _packing(options, dtype, device)
    elif options.gguf_file is not None:
        chosen["quantization_config"] = GgufConfig(dequantize=True)  # packed weights can be neither edited nor merged
    where = _where(source, options)
    tokenizer = read_tokenizer(source, options)  # before the weights, which take much longer
    with _readable(where), _bars_where_long(source):
        config = AutoConfig.from_pretrained(source, **_place(options))
        if config.is_encoder_decoder:
            kind = type(config).__name__
            raise UserError(f"{where} is an encoder-decoder ({kind}); only decoders can be edited")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, output_loading_info=True, **_place(options), **chosen
        )
    model, found = loaded
    _check_whole(where, found)
    _keep_differentiable(model)
    _check_causal(where, model.eval())
    return model, tokenizer


def read_tokenizer(source: str, options: Loading = PLAIN) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a causal LM, without the weights (arguments as for `read_model`).

    Raises:
        UserError: If there is none, its files cannot be read, or it provides no character offsets.
    """
    where = _where(source, options)
    with _readable(where):
        metadata = None
        if options.gguf_file is not None:
            metadata = gguf.read_metadata(str(cached_file(source, options.gguf_file, revision=options.revision)))
        tokenizer = AutoTokenizer.from_pretrained(source, **_place(options))
    if not tokenizer.is_fast:
        raise UserError(f"{where}: its tokenizer knows no character offsets (a fast tokenizer is needed)")
    # Without files, some tokenizer classes create one with an empty vocabulary.
    if not set(tokenizer("The", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
        raise UserError(f"{where} has no tokenizer (tokenizer.json), or one that knows no words")
    if metadata is not None:
        gguf.correct_tokenizer(tokenizer, metadata)
    return tokenizer


def _where(source: str, options: Loading) -> str:
    return f"model '{source}/{options.gguf_file}'" if options.gguf_file else f"model {source!r}"


def _place(options: Loading) -> dict[str, Any]:
    """Returns the arguments that locate configuration, tokenizer and weights alike."""
    found = {"revision": options.revision, "gguf_file": options.gguf_file}
    return {"trust_remote_code": False} | {name: value for name, value in found.items() if value is not None}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"unknown dtype {name!r}; for instance float32, bfloat16, float16")
    return dtype


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Shortens errors of transformers to one line, and hides its reports on missing weights in favour of ours."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {reason}") from error
    finally:
        logging.set_verbosity(level)


@contextmanager
def _bars_where_long(source: str) -> Iterator[None]:
    """Hides transformers' progress bars for local files of less than a gigabyte, which are read in a moment."""
    folder = Path(source)
    short = folder.is_dir() and sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 1e9
    shown = logging.is_progress_bar_enabled()
    if short and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if short and shown:
            logging.enable_progress_bar()


def _check_whole(where: str, found: dict[str, Any]) -> None:
    """Refuses a model some of whose weights would be random, or some of whose blocks would be left out.

    Tied weights, computed buffers, and whatever transformers knows to be harmless are in none of the lists.
    """
    odd = {name for name, *_ in found["mismatched_keys"]}
    problems = {
        "lacks weights": found["missing_keys"] - odd,
        "has weights of another shape than its config says": odd,
        "has weights of layers that its config does not have": _of_layers(found["unexpected_keys"]),
    }
    for problem, names in problems.items():
        if names:
            raise UserError(f"{where} {problem}: {_some(names)}")
    if others := found["unexpected_keys"]:
        warnings.warn(f"{where}: not used by a causal LM, so left out: {_some(others)}", stacklevel=4)


def _of_layers(names: set[str]) -> set[str]:
    """Returns the names within numbered layers: any others are those of another head, which the LM does not need."""
    return {name for name in names if re.search(r"\.\d+\.", name)}


def _some(names: set[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


@torch.no_grad()
def _check_causal(where: str, model: PreTrainedModel) -> None:
    """Refuses encoders, which transformers loads as causal LMs too: the first token must not see the second."""
    ids = torch.tensor([[1, 0], [1, 2]], device=model.device)
    try:
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0].float()
    except (TypeError, ValueError, RuntimeError):  # a model with other inputs raises its own error when it is used
        return
    if (first[0] - first[1]).abs().max() > first.abs().max() * torch.finfo(model.dtype).eps ** 0.5:
        kind = type(model.config).__name__
        raise UserError(f"{where} reads text in both directions ({kind}); only decoders can be edited")


def _packing(options: Loading, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Returns the arguments that make transformers pack (quantize) the weights.

    Raises:
        UserError: If the kind of packing is unknown or does not go with the file, or its libraries are not installed.
    """
    from transformers import BitsAndBytesConfig

    quantize = options.quantize
    known: dict[str | None, dict[str, Any]] = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }
    if quantize not in known:
        raise UserError(f"unknown quantize {quantize!r}; one of {', '.join(map(str, known))}")
    if options.gguf_file is not None:
        raise UserError(f"quantize={quantize!r} does not go with {options.gguf_file}: save that as a plain model first")
    if missing := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"quantize={quantize!r} needs {' and '.join(missing)}, which is not installed: "
            "pip install 'instructedit[quantize]'"
        )
    # It warns at every call that it rounds its inputs to float16, which is how it works.
    python_logging.getLogger("bitsandbytes.autograd._functions").setLevel(python_logging.ERROR)
    return {
        "quantization_config": BitsAndBytesConfig(**known[quantize]),
        "device_map": options.device_map or {"": str(device)},
    }


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keeps 4-bit layers from repacking themselves on some CPUs in passes without gradients: they then give none."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute of every module)
