"""GGUF files (llama.cpp's format): reading their metadata, and correcting the tokenizer that transformers makes.

transformers reads the weights, and unpacks quantized ones (4 bits per weight, say).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf import read_gguf_metadata

from instructedit.errors import UserError

#: Pre-tokenizers, by llama.cpp's name (its ``llm_tokenizer_bpe``), that separate every digit before GPT-2's own split;
#: transformers does not know these and would split as GPT-2 does.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def read_metadata(file: str | Path) -> Mapping[str, Any]:
    """Reads the metadata of a GGUF file, without its weights.

    Raises:
        UserError: If it is not a complete GGUF file, is one of several parts, or holds no tokenizer.
    """
    try:
        metadata, _ = read_gguf_metadata(str(file))
    except Exception as error:  # the reader raises errors of many kinds
        raise UserError(f"{file}: not a GGUF file, or a damaged one ({type(error).__name__}: {error})") from error
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{file}: one of {metadata['split.count']} parts; put them together first (llama-gguf-split)")
    if "tokenizer.ggml.tokens" not in metadata:
        raise UserError(f"{file}: a GGUF file without a tokenizer")
    return metadata


def correct_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> None:
    """Corrects what transformers does not take over from the file: the separation of digits, and the maximum length."""
    if metadata.get("tokenizer.ggml.pre") in _DIGITS_APART:
        digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    architecture = metadata["general.architecture"]
    tokenizer.model_max_length = metadata.get(f"{architecture}.context_length", tokenizer.model_max_length)
