"""Decoding token by token: the loop, keys and values that are laid down once, and draws that each row makes itself."""

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

#: Names under which architectures give what they keep of the tokens read, and take it back.
CACHES = ("past_key_values", "cache_params", "state")


def preallocated_cache(
    config: PreTrainedConfig, room: int, at_rest: torch.dtype | None = None, longest: int | None = None
) -> Cache | None:
    """A cache of keys and values that copies none of them for the tokens that follow, up to `room` tokens a row.

    transformers' own makes the whole tensor anew for each token: most of the time of a long text, and for a moment
    twice the memory of a layer.

    Args:
        config: Of the model.
        room: Tokens.
        at_rest: What they are rounded to while their layer does not run; None keeps them as they are computed.
        longest: Tokens that see each other, at most; by default all that there is room for.

    Returns:
        None unless all layers attend to all tokens: the model then knows better what to keep.
    """
    if not attends_to_all(config, longest or room):
        return None
    cache = _usual_cache(config)
    cache.layers = [_RoomyLayer(room, at_rest) for _ in cache.layers]
    return cache


def attends_to_all(config: PreTrainedConfig, tokens: int) -> bool:
    """Whether each layer attends to all tokens before, and nothing else, in rows of so many.

    Not so with a shorter window, or a running state.
    """
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > tokens)
        for layer in _usual_cache(config).layers
    )


def _usual_cache(config: PreTrainedConfig) -> DynamicCache:
    return DynamicCache(config=config.get_text_config(decoder=True))


class _RoomyLayer(DynamicLayer):
    keys: Tensor
    values: Tensor

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


#: From the logits of the rows, [rows, vocab], and which of its new tokens each chooses now, [rows], to these tokens.
#: Rows that still read their prompt have negative numbers, and what is chosen for them is of no account.
Choice = Callable[[Tensor, Tensor], Tensor]


def likeliest(logits: Tensor, step: Tensor) -> Tensor:
    """Greedy decoding, [rows]."""
    return logits.argmax(-1)


class Draw:
    """Draws each next token, each row by its own numbers; the text ends at none of the tokens in `never`.

    transformers' own sampling sorts out and draws over the whole vocabulary, with one generator for all rows: what a
    row says then depends on the rows beside it.

    Args:
        draws: Uniform in [0, 1), [rows, tokens].
        k: Likeliest tokens to draw from; None or 0 draws from all.
        never: Tokens that are not drawn, such as those that end a text.
        p: Draw from the fewest likeliest tokens with this share of the probability (nucleus; Holtzman et al. 2020).
        temperature: Divides the logits.
    """

    def __init__(
        self, draws: Tensor, k: int | None = None, never: Sequence[int] = (), p: float = 1.0, temperature: float = 1.0
    ) -> None:
        self.draws, self.k, self.never, self.p, self.temperature = draws, k, list(never), p, temperature

    def __call__(self, logits: Tensor, step: Tensor) -> Tensor:
        """The drawn tokens, [rows] (see `Choice`)."""
        scores = logits.float() / self.temperature
        scores[:, self.never] = -torch.inf
        tokens = None
        if self.k or self.p < 1:
            scores, tokens = scores.topk(min(self.k or scores.shape[-1], scores.shape[-1]))
        reached = scores.double().softmax(-1).cumsum(-1)
        last = (reached < min(self.p, 1.0)).sum(-1, keepdim=True).clamp(max=reached.shape[-1] - 1)
        draw = self.draws.gather(-1, step.clamp(0, self.draws.shape[-1] - 1).unsqueeze(-1))
        # Of what the last one reaches, since sums of rounded shares may miss 1.
        place = (reached <= draw * reached.gather(-1, last)).sum(-1, keepdim=True).minimum(last)
        return (place if tokens is None else tokens.gather(-1, place)).squeeze(-1)


def draws(seeds: Sequence[int | str], tokens: int) -> Tensor:
    """Numbers uniform in [0, 1) for every token of each row, [rows, tokens], which depend on the row's seed alone."""
    own = [random.Random(str(seed)) for seed in seeds]
    return torch.tensor([[row.random() for _ in range(tokens)] for row in own], dtype=torch.float64)


class Layout(NamedTuple):
    """How rows of different lengths run together.

    Attributes:
        padded: Shorter prompts stand behind padding, so that all end together. Else all begin together: longer ones
            are read on, token by token, while shorter ones are continued, and no row ever holds padding.
        cached: Each forward pass reads the new tokens alone. Else each reads all, which any model does rightly.
    """

    padded: bool
    cached: bool


class Decoder:
    """Continues prompts token by token. Of the model's own generation settings nothing has a say.

    Architectures differ in how they take padding (positions, windows, running states) and a cache: each model is tried
    out once, and the fastest layout is taken that gives the logits of whole rows without either.

    Args:
        model: A causal LM, in eval mode; hooks on it stay in force, and see all rows in each pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes = set(inspect.signature(model.forward).parameters)

    def __call__(
        self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], choose: Choice = likeliest,
        ends: Sequence[int] = (), at_rest: torch.dtype | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The token ids that follow each prompt, the one that ends it included.

        Args:
            prompts: Token ids; none is empty.
            rooms: New tokens of each row, at most.
            choose: Chooses the next tokens.
            ends: Tokens that end a text.
            at_rest: Of keys and values, see `preallocated_cache`.

        Raises:
            UserError: If the model gives no numbers (NaN).
        """
        exact, head = torch.autocast(self.model.device.type, enabled=False), self.model.get_output_embeddings()
        with exact, small_batch_matmul(self.model.modules()), hooks.contiguous_inputs(head):
            return self._continued(self.layout, prompts, rooms, choose, ends, at_rest)

    @functools.cached_property
    def layout(self) -> Layout:
        """The fastest layout that is right for this model."""
        vocab = self.model.config.get_text_config().vocab_size
        prompts = [[(3 + 7 * (i + row)) % min(vocab, 50) for i in range(size)] for row, size in enumerate((4, 16, 7))]
        forced = torch.tensor([[11, 4], [5, 8], [9, 21]], device=self.model.device) % vocab
        with hooks.bare(self.model.modules()):
            expected = self._whole(prompts, forced)
            for layout in (Layout(True, True), Layout(False, True)):
                try:
                    found = self._probed(layout, prompts, forced)
                except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
                    continue  # as an architecture says that it cannot
                error = (found - expected).abs().max() / expected.abs().max()
                if error < torch.finfo(self.model.dtype).eps ** 0.5:
                    return layout
        return Layout(False, False)

    def _whole(self, prompts: list[list[int]], forced: Tensor) -> Tensor:
        """The same as `_probed` finds, in one pass: padding behind a row is nothing to a model that reads forwards."""
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=forced.device)
        ids = torch.zeros(len(prompts), int(sizes.max()) + forced.shape[1], dtype=torch.long, device=forced.device)
        for row, prompt, told in zip(ids, prompts, forced.tolist(), strict=True):
            row[: len(prompt) + len(told)] = torch.tensor(prompt + told)
        logits = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
        steps = torch.arange(forced.shape[1], device=ids.device)
        found: Tensor = logits[torch.arange(len(ids), device=ids.device)[:, None], sizes[:, None] - 1 + steps]
        return found.float()

    def _probed(self, layout: Layout, prompts: list[list[int]], forced: Tensor) -> Tensor:
        """Logits of the steps at which each row is made to go on as told, [rows, steps, vocab]."""
        found: dict[tuple[int, int], Tensor] = {}

        def choose(logits: Tensor, step: Tensor) -> Tensor:
            found.update({(row, at): logits[row].float() for row, at in enumerate(step.tolist())})
            return forced.gather(-1, step.clamp(0, forced.shape[1] - 1).unsqueeze(-1)).squeeze(-1)

        self._continued(layout, prompts, [forced.shape[1]] * len(prompts), choose)
        rows = [torch.stack([found[row, at] for at in range(forced.shape[1])]) for row in range(len(prompts))]
        return torch.stack(rows)

    def _continued(
        self, layout: Layout, prompts: Sequence[Sequence[int]], rooms: Sequence[int], choose: Choice,
        ends: Sequence[int] = (), at_rest: torch.dtype | None = None,
    ) -> list[list[int]]:  # fmt: skip
        width, columns = max(map(len, prompts)), max(map(len, prompts)) + max(rooms)
        starts = [width - len(prompt) if layout.padded else 0 for prompt in prompts]
        firsts = [start + len(prompt) for start, prompt in zip(starts, prompts, strict=True)]
        written = [[0] * s + [*p] + [0] * (columns - f) for s, p, f in zip(starts, prompts, firsts, strict=True)]
        ids, first, room = (torch.tensor(given, device=self.model.device) for given in (written, firsts, rooms))
        stops = torch.tensor(list(ends), dtype=torch.long, device=ids.device)
        said, broken = torch.zeros_like(room), torch.zeros_like(room[0])
        done = said >= room
        run = self._stepwise(torch.tensor(starts, device=ids.device), layout, columns, at_rest)
        for column in range(min(firsts), columns):
            logits = run(ids[:, :column])
            chosen = choose(logits, column - first)
            speaks = ~done & (column >= first)
            broken += (logits.amax(-1).isnan() & speaks).sum()
            ids[:, column] = torch.where(speaks, chosen, ids[:, column])
            said += speaks
            done |= speaks & (torch.isin(chosen, stops) | (said >= room))
            if done.all():
                break
        if broken:
            raise UserError("the model's logits are not numbers (NaN): no text can be made of them")
        places = zip(ids.tolist(), firsts, said.tolist(), strict=True)
        return [row[begin : begin + count] for row, begin, count in places]

    def _stepwise(
        self, start: Tensor, layout: Layout, room: int, at_rest: torch.dtype | None
    ) -> Callable[[Tensor], Tensor]:
        """A function from all tokens so far, [rows, columns], to the logits after them, [rows, vocab].

        Args:
            start: Column at which each row begins, [rows].
            layout: Whether there is padding, and whether to keep what earlier calls have read.
            room: Columns, at most.
            at_rest: See `preallocated_cache`.
        """
        kept: dict[str, Any] = {}
        if layout.cached and "past_key_values" in self._takes:
            kept["past_key_values"] = preallocated_cache(self.model.config, room, at_rest)
        read = 0

        def run(ids: Tensor) -> Tensor:
            nonlocal read
            place = torch.arange(ids.shape[1], device=ids.device) - start.unsqueeze(-1)
            options: dict[str, Any] = {"logits_to_keep": 1}
            if layout.padded:  # else the model counts positions itself, in its own way (RoBERTa's begin at 2)
                options["position_ids"] = place.clamp(min=0)[:, read:]
            options = {name: value for name, value in options.items() if name in self._takes} | kept
            if layout.padded:
                options["attention_mask"] = (place >= 0).long()
            output = self.model(input_ids=ids[:, read:], use_cache=layout.cached, return_dict=True, **options)
            if layout.cached:
                read = ids.shape[1]
                kept.update((name, output[name]) for name in CACHES if output.get(name) is not None)
                if not kept:
                    raise ValueError("the model gives no cache")
            logits: Tensor = output.logits[:, -1]
            return logits

        return run
