"""Decoding token by token: the loop, a preallocated key-value cache, and sampling with a seed for each row."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from instructedit.errors import UserError
from instructedit.lm import hooks
from instructedit.lm.small_batch import small_batch_matmul

#: Names of the outputs and arguments through which architectures pass their cache of the tokens read.
CACHES = ("past_key_values", "cache_params", "state")


def preallocated_cache(
    config: PreTrainedConfig, capacity: int, storage_dtype: torch.dtype | None = None, longest: int | None = None
) -> Cache | None:
    """Creates a preallocated cache of keys and values, so that new tokens copy no others.

    transformers' own cache reallocates the whole tensor for each token: this takes most of the time of a long text, and
    briefly twice the memory of a layer.

    Args:
        config: Config of the model.
        capacity: Maximum number of tokens in a row.
        storage_dtype: Dtype of keys and values while their layer does not run; None keeps them as they are computed.
        longest: Maximum number of tokens that attend to each other; by default `capacity`.

    Returns:
        The cache; None unless all layers attend to all tokens, since the model then knows better what to keep.
    """
    if not attends_to_all(config, longest or capacity):
        return None
    cache = _usual_cache(config)
    cache.layers = [_PreallocatedLayer(capacity, storage_dtype) for _ in cache.layers]
    return cache


def attends_to_all(config: PreTrainedConfig, tokens: int) -> bool:
    """True if each layer attends to all previous tokens, and to nothing else, in rows of `tokens` tokens.

    It is False with a shorter sliding window, or a recurrent state.
    """
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > tokens)
        for layer in _usual_cache(config).layers
    )


def _usual_cache(config: PreTrainedConfig) -> DynamicCache:
    return DynamicCache(config=config.get_text_config(decoder=True))


class _PreallocatedLayer(DynamicLayer):
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int, storage_dtype: torch.dtype | None) -> None:
        super().__init__()
        self._buffers = (_Buffer(capacity, storage_dtype), _Buffer(capacity, storage_dtype))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers
        self.keys, self.values = keys.after(self.keys, key_states), values.after(self.values, value_states)
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)


class _Buffer:
    """Preallocated storage for one tensor that grows along its sequence dimension, [rows, heads, capacity, size]."""

    def __init__(self, capacity: int, storage_dtype: torch.dtype | None) -> None:
        self.capacity, self.storage_dtype = capacity, storage_dtype
        self.whole = self.filled = torch.empty(0)

    def after(self, previous: Tensor | None, new: Tensor) -> Tensor:
        """Appends `new` to `previous`, in place if that is the last result, which it is not if beams are reselected."""
        start = 0 if previous is None or not previous.numel() else previous.shape[-2]
        end = start + new.shape[-2]
        if previous is not self.filled or end > self.whole.shape[-2]:
            shape = (*new.shape[:-2], max(self.capacity, end), new.shape[-1])
            self.whole = new.new_empty(shape, dtype=self.storage_dtype or new.dtype)
            if previous is not None and start:
                self.whole.narrow(-2, 0, start).copy_(previous)
        self.whole.narrow(-2, start, end - start).copy_(new)
        self.filled = self.whole.narrow(-2, 0, end)
        return self.filled


#: Maps the logits of the rows, [rows, vocab], and the number of the new token that each row chooses now, [rows], to
#: these tokens. Rows that still read their prompt have negative numbers, and the tokens chosen for them are ignored.
Choice = Callable[[Tensor, Tensor], Tensor]


def likeliest(logits: Tensor, step: Tensor) -> Tensor:
    """Returns the most likely token of each row (greedy decoding), [rows]."""
    return logits.argmax(-1)


class Draw:
    """Samples the next tokens, each row with its own random numbers; tokens in `never` are never drawn.

    transformers' own sampling filters and draws over the whole vocabulary, with one generator for all rows: the text of
    a row then depends on the other rows of its batch.

    Args:
        draws: Random numbers, uniform in [0, 1), [rows, tokens].
        k: Likeliest tokens to draw from; None or 0 draws from all.
        never: Tokens that are not drawn, such as those that end a text.
        p: Draw from the smallest set of likeliest tokens with this much probability (nucleus; Holtzman et al. 2020).
        temperature: Divides the logits.
    """

    def __init__(
        self, draws: Tensor, k: int | None = None, never: Sequence[int] = (), p: float = 1.0, temperature: float = 1.0
    ) -> None:
        self.draws, self.k, self.never, self.p, self.temperature = draws, k, list(never), p, temperature

    def __call__(self, logits: Tensor, step: Tensor) -> Tensor:
        """Draws the next token of each row, [rows] (see `Choice`)."""
        scores = logits.float() / self.temperature
        scores[:, self.never] = -torch.inf
        tokens = None
        if self.k or self.p < 1:
            scores, tokens = scores.topk(min(self.k or scores.shape[-1], scores.shape[-1]))
        reached = scores.double().softmax(-1).cumsum(-1)
        last = (reached < min(self.p, 1.0)).sum(-1, keepdim=True).clamp(max=reached.shape[-1] - 1)
        draw = self.draws.gather(-1, step.clamp(0, self.draws.shape[-1] - 1).unsqueeze(-1))
        # Scaled by the probability up to the last candidate, since rounded probabilities may not sum to 1.
        index = (reached <= draw * reached.gather(-1, last)).sum(-1, keepdim=True).minimum(last)
        return (index if tokens is None else tokens.gather(-1, index)).squeeze(-1)


def draws(seeds: Sequence[int | str], tokens: int) -> Tensor:
    """Generates random numbers, uniform in [0, 1), [rows, tokens]; those of a row depend on its own seed alone."""
    own = [random.Random(str(seed)) for seed in seeds]
    return torch.tensor([[row.random() for _ in range(tokens)] for row in own], dtype=torch.float64)


class Layout(NamedTuple):
    """The arrangement in which rows of different lengths are decoded together.

    Attributes:
        padded: Shorter prompts are padded on the left, so that all end together. Otherwise all begin together: longer
            ones are still read token by token while shorter ones are continued, and no row ever holds padding.
        cached: Each forward pass reads the new tokens alone. Otherwise each reads all, which is correct for any model.
    """

    padded: bool
    cached: bool


class Decoder:
    """Continues prompts token by token; the model's own generation settings have no effect.

    Architectures differ in how they handle padding (positions, windows, recurrent states) and a cache: each model is
    tested once, and the fastest layout is used that gives the same logits as whole rows without either.

    Args:
        model: A causal LM, in eval mode; hooks on it stay active, and see all rows in each pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes = set(inspect.signature(model.forward).parameters)

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], choose: Choice = likeliest,
        ends: Sequence[int] = (), storage_dtype: torch.dtype | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Generates the token ids that follow each prompt, including the one that ends the text.

        Args:
            prompts: Token ids; none is empty.
            max_new_tokens: Maximum number of new tokens of each row.
            choose: Chooses the next tokens.
            ends: Tokens that end a text.
            storage_dtype: Storage dtype of keys and values (see `preallocated_cache`).

        Raises:
            UserError: If the model's logits are NaN.
        """
        exact, head = torch.autocast(self.model.device.type, enabled=False), self.model.get_output_embeddings()
        with exact, small_batch_matmul(self.model.modules()), hooks.contiguous_inputs(head):
            return self._continued(self.layout, prompts, max_new_tokens, choose, ends, storage_dtype)

    @functools.cached_property
    def layout(self) -> Layout:
        """The fastest layout that gives correct logits with this model."""
        vocab = self.model.config.get_text_config().vocab_size
        prompts = [[(3 + 7 * (i + row)) % min(vocab, 50) for i in range(size)] for row, size in enumerate((4, 16, 7))]
        forced = torch.tensor([[11, 4], [5, 8], [9, 21]], device=self.model.device) % vocab
        with hooks.bare(self.model.modules()):
            expected = self._whole(prompts, forced)
            for layout in (Layout(True, True), Layout(False, True)):
                try:
                    found = self._probed(layout, prompts, forced)
                except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
                    continue  # the ways in which architectures reject a layout
                error = (found - expected).abs().max() / expected.abs().max()
                if error < torch.finfo(self.model.dtype).eps ** 0.5:
                    return layout
        return Layout(False, False)

    def _whole(self, prompts: list[list[int]], forced: Tensor) -> Tensor:
        """Computes the logits of `_probed` in one pass of whole rows: right padding does not affect a causal model."""
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=forced.device)
        ids = torch.zeros(len(prompts), int(sizes.max()) + forced.shape[1], dtype=torch.long, device=forced.device)
        for row, prompt, continuation in zip(ids, prompts, forced.tolist(), strict=True):
            row[: len(prompt) + len(continuation)] = torch.tensor(prompt + continuation)
        mask = torch.ones_like(ids)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True).logits
        steps = torch.arange(forced.shape[1], device=ids.device)
        found: Tensor = logits[torch.arange(len(ids), device=ids.device)[:, None], sizes[:, None] - 1 + steps]
        return found.float()

    def _probed(self, layout: Layout, prompts: list[list[int]], forced: Tensor) -> Tensor:
        """Computes the logits of each step while every row is continued with forced tokens, [rows, steps, vocab]."""
        found: dict[tuple[int, int], Tensor] = {}

        def choose(logits: Tensor, step: Tensor) -> Tensor:
            found.update({(row, at): logits[row].float() for row, at in enumerate(step.tolist())})
            return forced.gather(-1, step.clamp(0, forced.shape[1] - 1).unsqueeze(-1)).squeeze(-1)

        self._continued(layout, prompts, [forced.shape[1]] * len(prompts), choose)
        rows = [torch.stack([found[row, at] for at in range(forced.shape[1])]) for row in range(len(prompts))]
        return torch.stack(rows)

    def _continued(
        self, layout: Layout, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], choose: Choice,
        ends: Sequence[int] = (), storage_dtype: torch.dtype | None = None,
    ) -> list[list[int]]:  # fmt: skip
        width, columns = max(map(len, prompts)), max(map(len, prompts)) + max(max_new_tokens)
        starts = [width - len(prompt) if layout.padded else 0 for prompt in prompts]
        firsts = [start + len(prompt) for start, prompt in zip(starts, prompts, strict=True)]
        written = [[0] * s + [*p] + [0] * (columns - f) for s, p, f in zip(starts, prompts, firsts, strict=True)]
        given = (written, firsts, max_new_tokens)
        ids, first, limit = (torch.tensor(part, device=self.model.device) for part in given)
        stops = torch.tensor(list(ends), dtype=torch.long, device=ids.device)
        generated, broken = torch.zeros_like(limit), torch.zeros_like(limit[0])
        done = generated >= limit
        run = self._stepwise(torch.tensor(starts, device=ids.device), layout, columns, storage_dtype)
        for column in range(min(firsts), columns):
            logits = run(ids[:, :column])
            chosen = choose(logits, column - first)
            continues = ~done & (column >= first)
            broken += (logits.amax(-1).isnan() & continues).sum()
            ids[:, column] = torch.where(continues, chosen, ids[:, column])
            generated += continues
            done |= continues & (torch.isin(chosen, stops) | (generated >= limit))
            if done.all():
                break
        if broken:
            raise UserError("the model's logits are not numbers (NaN): no text can be made of them")
        ranges = zip(ids.tolist(), firsts, generated.tolist(), strict=True)
        return [row[begin : begin + count] for row, begin, count in ranges]

    def _stepwise(
        self, start: Tensor, layout: Layout, capacity: int, storage_dtype: torch.dtype | None
    ) -> Callable[[Tensor], Tensor]:
        """Returns a function from all tokens so far, [rows, columns], to the logits after them, [rows, vocab].

        Args:
            start: Column at which each row begins, [rows].
            layout: Whether there is padding, and whether tokens of earlier calls are cached.
            capacity: Maximum number of columns.
            storage_dtype: See `preallocated_cache`.
        """
        kept: dict[str, Any] = {}
        if layout.cached and "past_key_values" in self._takes:
            kept["past_key_values"] = preallocated_cache(self.model.config, capacity, storage_dtype)
        read = 0

        def run(ids: Tensor) -> Tensor:
            nonlocal read
            position = torch.arange(ids.shape[1], device=ids.device) - start.unsqueeze(-1)
            options: dict[str, Any] = {"logits_to_keep": 1}
            if layout.padded:  # else the model counts positions itself, in its own way (RoBERTa's begin at 2)
                options["position_ids"] = position.clamp(min=0)[:, read:]
            elif not read:  # else transformers suspects padding in whole rows, and says so
                options["attention_mask"] = torch.ones_like(ids)
            options = {name: value for name, value in options.items() if name in self._takes} | kept
            if layout.padded:
                options["attention_mask"] = (position >= 0).long()
            output = self.model(input_ids=ids[:, read:], use_cache=layout.cached, return_dict=True, **options)
            if layout.cached:
                read = ids.shape[1]
                kept.update((name, output[name]) for name in CACHES if output.get(name) is not None)
                if not kept:
                    raise ValueError("the model gives no cache")
            logits: Tensor = output.logits[:, -1]
            return logits

        return run
