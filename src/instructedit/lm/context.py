"""Rows that an edit prepends a context to, and what is read of prompts to choose it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.edits import ContextEdit, Edit, LowRankEdit
from instructedit.lm.row_states import RowStates, in_groups
from instructedit.lm.text import Text
from instructedit.lm.tokens import TokenBatch, rows_of


class ContextStates:
    """Computes the states at answer positions with any edit, one that prepends contexts among them."""

    def __init__(self, rows: RowStates, text: Text) -> None:
        self.rows, self.text = rows, text
        self.prefix, self.applied, self.forward = rows.prefix, rows.applied, rows.forward

    def contexts_of(self, prompts: Sequence[list[int]]) -> tuple[list[list[int] | None], LowRankEdit | None]:
        """Finds what applied edits prepend to prompts.

        Args:
            prompts: Token ids, one for each row.

        Returns:
            The context of each prompt, None where there is none; and the change of weights with which prompts that
            have one are read.
        """
        if self.applied.prompt_prefix is None:
            return [None] * len(prompts), None
        edit, rows = self.applied.prompt_prefix
        batch = rows_of(prompts).to(self.forward.device)
        chosen = edit.choose(
            self.applied.index(edit, rows, len(batch)), lambda block: self.scope_embedding(batch, block)
        ).cpu()
        contexts = iter(edit.contexts(chosen[chosen >= 0]))
        return [next(contexts).tolist() if inside else None for inside in chosen >= 0], edit.adapter

    def shared(
        self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int | None
    ) -> tuple[Tensor, Tensor]:
        """The states at answer positions, [nodes, hidden], and which of them each position has, [positions]."""
        if edit is None and self.applied.prompt_prefix is not None:
            edit, rows = self.applied.prompt_prefix
        elif edit is not None and edit.is_identity:
            edit = rows = None  # runs as the model does without one: to the same bits
        if start is None:
            start = self.applied.sites.first_block(edit.sites) if edit is not None else 0
        if not isinstance(edit, ContextEdit):
            return self.rows.shared(batch, edit, rows, start)
        states = self._prepended(batch, edit, rows, start)
        return states, torch.arange(len(states), device=states.device)

    def _prepended(self, batch: TokenBatch, edit: ContextEdit, rows: Tensor | None, start: int) -> Tensor:
        """States of rows that read a context first, or, out of its scope, do not."""
        chosen = edit.choose(
            self.applied.index(edit, rows, len(batch)), lambda block: self.scope_embedding(batch, block)
        ).cpu()

        def run(group: Tensor) -> Tensor:
            part = batch.select(group)
            if chosen[group[0]] < 0:
                states, node = self.rows.shared(part, None, None, start)
                return states[node]
            part = part.behind(edit.contexts(chosen[group]), self.forward.max_length, self.text.opening)
            return self.rows.of(part, edit.adapter, None, start)

        groups = [(chosen < 0).nonzero().squeeze(-1), (chosen >= 0).nonzero().squeeze(-1)]
        return in_groups(batch, [group for group in groups if len(group)], run)

    def scope_embedding(self, batch: TokenBatch, block: int) -> Tensor:
        """Embeds each row's prompt for a gate: states that enter a block, at the prompt's last token and on average.

        Returns:
            [rows, 2 · hidden]; the answers take no part.
        """
        prompts = batch.prompts()
        hidden = self.prefix.of(prompts, block).float()
        mask = prompts.attention_mask.to(hidden.device)
        lengths = mask.sum(-1, keepdim=True)
        last = hidden[torch.arange(len(prompts), device=hidden.device), lengths.squeeze(-1) - 1]
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / lengths
        return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in (last, mean)], -1)
