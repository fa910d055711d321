"""Decoding token by token: keys and values that are laid down once, and draws that each row makes for itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer


def roomy_cache(config: PreTrainedConfig, room: int, at_rest: torch.dtype | None = None) -> Cache | None:
    """A cache of keys and values that copies none of them for the tokens that follow, up to `room` tokens a row.

    transformers' own makes the whole tensor anew for each token: most of the time of a long text, and for a moment
    twice the memory of a layer.

    Args:
        config: Of the model.
        room: Tokens.
        at_rest: What they are rounded to while their layer does not run; None keeps them as they are computed.

    Returns:
        None unless all layers attend to all tokens: the model then knows better what to keep.
    """
    cache = _usual_cache(config)
    if not _all_plain(cache):
        return None
    cache.layers = [_RoomyLayer(room, at_rest) for _ in cache.layers]
    return cache


def attends_to_all(config: PreTrainedConfig) -> bool:
    """Whether each layer of a model attends to all tokens before, and to nothing else (no window, no running state)."""
    return _all_plain(_usual_cache(config))


def _all_plain(cache: Cache) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _usual_cache(config: PreTrainedConfig) -> DynamicCache:
    return DynamicCache(config=config.get_text_config(decoder=True))


class _RoomyLayer(DynamicLayer):
    def __init__(self, room: int, at_rest: torch.dtype | None) -> None:
        super().__init__()
        self._buffers = (_Buffer(room, at_rest), _Buffer(room, at_rest))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers
        self.keys, self.values = keys.after(self.keys, key_states), values.after(self.values, value_states)
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)


class _Buffer:
    """Room for one tensor that grows along its sequence, [rows, heads, room, size]."""

    def __init__(self, room: int, at_rest: torch.dtype | None) -> None:
        self.room, self.at_rest = room, at_rest
        self.whole = self.filled = torch.empty(0)

    def after(self, held: Tensor | None, new: Tensor) -> Tensor:
        """`held` with `new` after it, in place if `held` is what was given last (beams, for one, are chosen anew)."""
        start = 0 if held is None or not held.numel() else held.shape[-2]
        end = start + new.shape[-2]
        if held is not self.filled or end > self.whole.shape[-2]:
            shape = (*new.shape[:-2], max(self.room, end), new.shape[-1])
            self.whole = new.new_empty(shape, dtype=self.at_rest or new.dtype)
            if held is not None and start:
                self.whole.narrow(-2, 0, start).copy_(held)
        self.whole.narrow(-2, start, end - start).copy_(new)
        self.filled = self.whole.narrow(-2, 0, end)
        return self.filled


class TopKDraw(LogitsProcessor):
    """Draws each next token among the likeliest ones, as greedy decoding then takes it; the text never ends early.

    transformers' own sampling sorts out and draws over the whole vocabulary, with one generator for all rows: what a
    row says then depends on the rows beside it.

    Args:
        draws: Uniform in [0, 1), [rows, tokens].
        k: Tokens to draw from.
        ends: Tokens that end a text.
    """

    def __init__(self, draws: Tensor, k: int, ends: Sequence[int] = ()) -> None:
        self._draws = iter(draws.unbind(-1))
        self.k, self.ends = k, list(ends)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits in which the drawn token is the best, [rows, vocab], changed in place."""
        scores[:, self.ends] = -torch.inf
        likeliest, tokens = scores.topk(min(self.k, scores.shape[-1]))
        reached = likeliest.double().softmax(-1).cumsum(-1)[:, :-1]
        place = (reached <= next(self._draws)[:, None]).sum(-1, keepdim=True)
        return scores.scatter_(-1, tokens.gather(-1, place), torch.inf)


def draws(seeds: Sequence[int | str], tokens: int) -> Tensor:
    """Numbers uniform in [0, 1) for every token of each row, [rows, tokens], which depend on the row's seed alone."""
    own = [random.Random(str(seed)) for seed in seeds]
    return torch.tensor([[row.random() for _ in range(tokens)] for row in own], dtype=torch.float64)
