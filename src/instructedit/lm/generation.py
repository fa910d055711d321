"""What a frozen LM says after prompts, under the edits that it has on: greedily, or drawn token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm.decoding import Choice, Draw, draws, likeliest
from instructedit.lm.disk_cache import STORAGE_DTYPES
from instructedit.lm.prefix_trees import WIDTH
from instructedit.lm.tokens import behind
from instructedit.records import stripped

if TYPE_CHECKING:
    from instructedit.lm.frozen import FrozenLM


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn (see `FrozenLM.sample`).

    Raises:
        UserError: If a number lies out of its range, or there is no such dtype.
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


@torch.inference_mode()
def generate(
    lm: FrozenLM, prompts: Sequence[str], rooms: Sequence[int], edit: Edit | None = None,
    rows: Sequence[int] | None = None,
) -> list[str]:  # fmt: skip
    """The most likely token at each step, at most `rooms` of them (see `FrozenLM.generate`)."""
    if len(rooms) != len(prompts):
        raise UserError(f"max_new_tokens has {len(rooms)} numbers for {len(prompts)} prompts")
    ends, trees = _ends(lm), lm.generation.shares_prompts(edit)

    def go_on(which: list[int], ids: list[list[int]], own: list[int]) -> list[list[int]]:
        mine = None if rows is None else [rows[i] for i in which]
        if trees and max(map(len, ids)) + max(own) <= WIDTH:
            return lm.continue_trees(ids, own, ends, edit, mine)
        with lm.edited(edit, mine) if trees else nullcontext():
            return lm.generation.decoder(ids, own, likeliest, ends)

    with nullcontext() if trees else lm.edited(edit, rows):
        return _said(lm, prompts, rooms, go_on)


@torch.inference_mode()
def sample(lm: FrozenLM, prompts: Sequence[str], tokens: int, seeds: Sequence[int | str], how: Drawing) -> list[str]:
    """Tokens drawn by each prompt's own seed (see `FrozenLM.sample`)."""
    if len(seeds) != len(prompts):
        raise UserError(f"there are {len(seeds)} seeds for {len(prompts)} prompts")
    drawn = draws(seeds, tokens).to(lm.device)
    ends = _ends(lm)
    stops, never = (ends, []) if how.ends else ([], ends)

    def go_on(rows: list[int], ids: list[list[int]], rooms: list[int]) -> list[list[int]]:
        choose: Choice = Draw(drawn[rows], how.top_k, never, how.top_p, how.temperature)
        return lm.generation.decoder(ids, rooms, choose, stops, STORAGE_DTYPES[how.kv_dtype])

    return _said(lm, prompts, [tokens] * len(prompts), go_on)


#: Given the numbers of some rows, their prompts' token ids, and how long each text may be: the token ids that follow.
_GoOn = Callable[[list[int], list[list[int]], list[int]], list[list[int]]]


def _said(lm: FrozenLM, prompts: Sequence[str], rooms: Sequence[int], go_on: _GoOn) -> list[str]:
    """The text that follows the prompts."""
    if not prompts:
        return []
    if min(rooms) < 1:
        raise UserError(f"max_new_tokens must be 1 or more, got {min(rooms)}")
    width = lm.max_length - max(rooms)
    if width < 1:
        raise UserError(f"max_new_tokens={max(rooms)} leaves no room for a prompt in {lm.max_length} tokens")
    ids = lm.text.prompts(prompts)
    if not all(stripped(prompt) for prompt in prompts):
        raise UserError("an empty prompt has nothing to continue")
    contexts, adapter = lm.context.contexts_of([row[-lm.max_length :] for row in ids])
    opening = lm.text.opening
    ids = [row if c is None else behind(row, c, width, opening) for row, c in zip(ids, contexts, strict=True)]
    ids = lm.text.shortened(ids, width)
    new: list[list[int]] = [[]] * len(ids)
    adapted = [adapter is not None and context is not None for context in contexts]
    for inside in (False, True):
        if group := [i for i, own in enumerate(adapted) if own == inside]:
            with lm.edited(adapter) if inside else nullcontext():
                found = go_on(group, [ids[i] for i in group], [rooms[i] for i in group])
            for i, own in zip(group, found, strict=True):
                new[i] = own
    return list(lm.tokenizer.batch_decode(new, skip_special_tokens=True))


def _ends(lm: FrozenLM) -> list[int]:
    """Tokens that end a text: all that is read of a model's own generation settings."""
    ends = lm.model.generation_config.eos_token_id
    every = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return [end for end in every if end < lm.model.config.get_text_config().vocab_size]
