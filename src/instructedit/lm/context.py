"""Rows that an edit treats by their prompts, and what is read of a prompt to choose how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.edits import Edit, LowRankEdit, PromptEdit
from instructedit.lm.row_states import RowStates, in_order
from instructedit.lm.text import Text
from instructedit.lm.tokens import TokenBatch, rows_of
from instructedit.rows import take_rows


class Route(NamedTuple):
    """Rows that are read in one way; by the unedited model unless it says otherwise.

    Attributes:
        rows: Their numbers, ascending, on the host.
        contexts: Token ids that stand in front of each.
        edit: What they are read with.
        numbers: Which of these edits each row has; None where it is one for all.
    """

    rows: Tensor
    contexts: list[Tensor] | None = None
    edit: LowRankEdit | None = None
    numbers: Tensor | None = None


class ContextStates:
    """Computes the states at answer positions with any edit, one that depends on the prompt among them."""

    def __init__(self, rows: RowStates, text: Text) -> None:
        self.rows, self.text = rows, text
        self.prefix, self.applied, self.forward = rows.prefix, rows.applied, rows.forward

    def routes(self, edit: PromptEdit, rows: Tensor | None, batch: TokenBatch) -> list[Route]:
        """Says how the rows of a batch are read: those out of all scopes, then those in scope of an entry."""
        index, prompts = self.applied.index(edit, rows, len(batch)).tolist(), batch.prompts()
        places: dict[tuple[int, ...], int] = {}  # of each prompt and edit among the different ones
        asked = [places.setdefault((i, *ids), len(places)) for i, ids in zip(index, prompts.unpadded(), strict=True)]
        first = torch.tensor([asked.index(place) for place in range(len(places))])
        own = torch.tensor([index[row] for row in first.tolist()], device=self.forward.device)
        chosen = edit.choose(own, PromptStates(self, prompts.select(first)))[asked]
        inside, found = chosen >= 0, []
        if not inside.all():
            found.append(Route((~inside).nonzero().squeeze(-1).cpu()))
        if inside.any():
            entries = chosen[inside]
            found.append(Route(inside.nonzero().squeeze(-1).cpu(), edit.contexts(entries), *edit.reading(entries)))
        return found

    def routes_of(self, prompts: Sequence[list[int]]) -> list[Route]:
        """The same for token ids of prompts, under the edit that is applied to prompts now."""
        if self.applied.prompt_edit is None:
            return [Route(torch.arange(len(prompts)))]
        edit, rows = self.applied.prompt_edit
        return self.routes(edit, rows, rows_of(prompts).to(self.forward.device))

    def shared(
        self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int | None
    ) -> tuple[Tensor, Tensor]:
        """The states at answer positions, [nodes, hidden], and which of them each position has, [positions]."""
        if edit is None and self.applied.prompt_edit is not None:
            edit, rows = self.applied.prompt_edit
            start = start or 0  # out of scope as the model runs where nothing is applied, to the same bits
        elif edit is not None and edit.is_identity:
            edit = rows = None  # runs as the model does without one: to the same bits
        if start is None:
            start = self.applied.sites.first_block(edit.sites) if edit is not None else 0
        if not isinstance(edit, PromptEdit):
            return self.rows.shared(batch, edit, rows, start)
        states = self._routed(batch, edit, rows, start)
        return states, torch.arange(len(states), device=states.device)

    def _routed(self, batch: TokenBatch, edit: PromptEdit, rows: Tensor | None, start: int) -> Tensor:
        """States of rows of which each is read as its prompt says."""
        routes = self.routes(edit, rows, batch)

        def run(route: Route) -> Tensor:
            part = batch.select(route.rows)
            if route.contexts is not None:
                part = part.behind(route.contexts, self.forward.max_length, self.text.opening)
            states, node = self.rows.shared(part, route.edit, route.numbers, start)
            return take_rows(states, node)

        return in_order(batch, [route.rows for route in routes], [run(route) for route in routes])

    def scope_embedding(self, batch: TokenBatch, block: int) -> Tensor:
        """Embeds each row's prompt for a gate: states that enter a block, at the prompt's last token and on average.

        Returns:
            [rows, 2 · hidden]; the answers take no part.
        """
        return PromptStates(self, batch.prompts())(block)


class PromptStates:
    """What gates read of prompts (see `edits.Prompts`).

    Args:
        context: Computes states.
        prompts: Rows without answers.
        rows: The same rows with answers, where their states are known anyway: a prompt's are the same in them but for
            rounding.
    """

    def __init__(self, context: ContextStates, prompts: TokenBatch, rows: TokenBatch | None = None) -> None:
        self.prefix, self.prompts, self.rows = context.prefix, prompts, rows or prompts

    def __call__(self, block: int) -> Tensor:
        hidden, there = self._read(block)
        lengths = there.sum(-1, keepdim=True)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths.squeeze(-1) - 1]
        mean = (hidden * there.unsqueeze(-1)).sum(1) / lengths
        return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in (last, mean)], -1)

    def tokens(self, block: int) -> tuple[Tensor, Tensor]:
        """States at each token of a prompt, [prompts, seq, hidden], and which are there, bool [prompts, seq]."""
        hidden, there = self._read(block)
        return F.layer_norm(hidden, hidden.shape[-1:]), there.bool()

    def _read(self, block: int) -> tuple[Tensor, Tensor]:
        hidden = self.prefix.of(self.rows, block)[:, : self.prompts.input_ids.shape[1]].float()
        return hidden, self.prompts.attention_mask.to(hidden.device)
