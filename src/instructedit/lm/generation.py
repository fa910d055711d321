"""Text generation with a frozen model, under the edits that are applied to it: greedy, or sampled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch

from instructedit.edits import Edit, PromptEdit
from instructedit.errors import UserError
from instructedit.lm import hooks
from instructedit.lm.cache.shard import STORAGE_DTYPES
from instructedit.lm.context import ContextStates
from instructedit.lm.decoding import Choice, Decoder, Draw, draws, likeliest
from instructedit.lm.prefix_trees import WIDTH
from instructedit.lm.text import Text
from instructedit.lm.tokens import prepend_context
from instructedit.lm.tree_decoding import continue_trees


@dataclass(frozen=True)
class Drawing:
    """The options of sampling: how tokens are drawn.

    Attributes:
        top_k: Likeliest tokens to draw from; None or 0 draws from all.
        top_p: Draw from the smallest set of likeliest tokens that has this much probability.
        temperature: Divides the logits.
        kv_dtype: Stores keys and values in ``float32`` (as they are computed), ``bfloat16`` or ``float16``.
        ends: Whether a text may end before it reaches its length.

    Raises:
        UserError: If a number is out of its range, or the dtype is unknown.
    """

    top_k: int | None = 5
    top_p: float = 1.0
    temperature: float = 1.0
    kv_dtype: str = "float32"
    ends: bool = False

    def __post_init__(self) -> None:
        if self.kv_dtype not in STORAGE_DTYPES:
            raise UserError(f"kv_dtype: {self.kv_dtype!r} is none of {', '.join(STORAGE_DTYPES)}")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k must be a number of tokens, or none for all, got {self.top_k}")
        if not 0 < self.top_p <= 1 or not self.temperature > 0:
            raise UserError(
                f"top_p must lie in (0, 1] and temperature above 0, got {self.top_p} and {self.temperature}"
            )


#: Edits, and which of them each row has.
_Applied = tuple[Edit, list[int] | None]
#: Maps the numbers of some rows, their prompts' token ids, the maximum length of each text, and the edits that they are
#: read with, to the token ids that follow.
_Continue = Callable[[list[int], list[list[int]], list[int], _Applied | None], list[list[int]]]


class Generation:
    """Continues prompts with a frozen model, under the edits that are applied to it.

    Args:
        context: The model's states, and what applied edits prepend to prompts.
        text: Turns prompts into tokens.
    """

    def __init__(self, context: ContextStates, text: Text) -> None:
        self.context, self.text = context, text
        self.applied, self.forward = context.applied, context.forward

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Decoder that continues token ids row by row."""
        return Decoder(self.forward.model)

    @functools.cached_property
    def row_tokens(self) -> int:
        """Number of tokens whose keys and values take about as much memory as a row's next logits and their copy."""
        config = self.forward.model.config.get_text_config()
        return math.ceil(config.vocab_size / (config.num_hidden_layers * config.hidden_size))

    def shares_prompts(self, edit: Edit | None) -> bool:
        """True if prompts of one edit share the work of their common beginnings, where the caller applies no edit."""
        positionwise = edit is None or (edit.positionwise and not isinstance(edit, PromptEdit))
        return positionwise and not self.applied.layers and self.context.prefix.takes_prompt_prefixes

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str], lengths: Sequence[int], edit: Edit | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[str]:  # fmt: skip
        """Generates the most likely token at each step (see `FrozenLM.generate`).

        Args:
            prompts: The prompts.
            lengths: Maximum number of new tokens of each.
            edit: The edits to apply.
            rows: Which edit each prompt has.
        """
        if len(lengths) != len(prompts):
            raise UserError(f"max_new_tokens has {len(lengths)} numbers for {len(prompts)} prompts")
        ends, chooses = self._ends(), isinstance(edit, PromptEdit)
        given = None if edit is None or chooses else (edit, self._index(edit, rows, len(prompts)))

        def go_on(which: list[int], ids: list[list[int]], own: list[int], by: _Applied | None) -> list[list[int]]:
            mine = given and (given[0], None if given[1] is None else [given[1][i] for i in which])
            edits = [pair for pair in (mine, by) if pair is not None]
            one = edits[0] if edits else (None, None)
            if len(edits) < 2 and self.shares_prompts(one[0]) and max(map(len, ids)) + max(own) <= WIDTH:
                return continue_trees(self.applied, ids, own, ends, *one)
            with ExitStack() as stack:
                for pair in edits:
                    stack.enter_context(self.applied.edited(*pair))
                return self.decoder(ids, own, likeliest, ends)

        with self.applied.edited(edit, rows) if chooses else nullcontext():
            return self._texts(prompts, lengths, go_on)

    def _index(self, edit: Edit, rows: Sequence[int] | None, count: int) -> list[int] | None:
        """Returns the index of each prompt's edit, or None if all share the only one."""
        index = self.applied.named(edit, rows)
        hooks.check_rows(edit, index, count)
        return None if len(edit) == 1 else list(range(count)) if index is None else index.tolist()

    @torch.inference_mode()
    def sample(self, prompts: Sequence[str], tokens: int, seeds: Sequence[int | str], how: Drawing) -> list[str]:
        """Samples a continuation of each prompt, token by token.

        Args:
            prompts: Texts to continue.
            tokens: Number of new tokens of each; fewer if a text may end (`Drawing.ends`).
            seeds: One for each prompt: its draws depend on that alone, not on the other prompts.
            how: How tokens are drawn.

        Raises:
            UserError: As for `FrozenLM.generate`.
        """
        if len(seeds) != len(prompts):
            raise UserError(f"there are {len(seeds)} seeds for {len(prompts)} prompts")
        drawn = draws(seeds, tokens).to(self.forward.device)
        ends = self._ends()
        stops, never = (ends, []) if how.ends else ([], ends)

        def go_on(rows: list[int], ids: list[list[int]], lengths: list[int], by: _Applied | None) -> list[list[int]]:
            choose: Choice = Draw(drawn[rows], how.top_k, never, how.top_p, how.temperature)
            with self.applied.edited(*by) if by else nullcontext():
                return self.decoder(ids, lengths, choose, stops, STORAGE_DTYPES[how.kv_dtype])

        return self._texts(prompts, [tokens] * len(prompts), go_on)

    def _texts(self, prompts: Sequence[str], lengths: Sequence[int], go_on: _Continue) -> list[str]:
        """Generates the text that follows each prompt; prompts that are routed alike are continued together."""
        if not prompts:
            return []
        limit = self.forward.max_length
        if min(lengths) < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {min(lengths)}")
        width = limit - max(lengths)
        if width < 1:
            raise UserError(f"max_new_tokens={max(lengths)} leaves no room for a prompt in {limit} tokens")
        ids = self.text.shortened(self.text.prompts(prompts), width)
        if not all(ids):  # an empty prompt begins a text, if the tokenizer has a token for that
            raise UserError("an empty prompt has nothing to continue")
        new: list[list[int]] = [[]] * len(ids)
        for route in self.context.routes_of(ids):
            rows = route.rows.tolist()
            own = self._prepended([ids[i] for i in rows], route.contexts, width)
            index = None if route.numbers is None else route.numbers.tolist()
            found = go_on(rows, own, [lengths[i] for i in rows], None if route.edit is None else (route.edit, index))
            for i, text in zip(rows, found, strict=True):
                new[i] = text
        return list(self.text.tokenizer.batch_decode(new, skip_special_tokens=True))

    def _prepended(self, ids: list[list[int]], contexts: Sequence[torch.Tensor] | None, width: int) -> list[list[int]]:
        """Prepends their contexts to prompts, as far as there is room for them in `width` tokens."""
        if contexts is None:
            return ids
        opening = self.text.opening
        return [prepend_context(row, c.tolist(), width, opening) for row, c in zip(ids, contexts, strict=True)]

    def _ends(self) -> list[int]:
        """Returns the tokens that end a text, the only generation setting of the model that is used."""
        model = self.forward.model
        ends = model.generation_config.eos_token_id
        every = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return [end for end in every if end < model.config.get_text_config().vocab_size]
