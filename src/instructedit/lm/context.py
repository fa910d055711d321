"""Edits that depend on the prompt: how rows are routed by their prompts, and the prompt states that gates read."""

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
    """Rows that are processed in the same way: by the unedited model, unless contexts or an edit are given.

    Attributes:
        rows: Row numbers, ascending, on the host.
        contexts: Token ids that are prepended to each row.
        edit: Edits that are applied to the rows.
        numbers: Which of these edits each row has; None if all share the only one.
    """

    rows: Tensor
    contexts: list[Tensor] | None = None
    edit: LowRankEdit | None = None
    numbers: Tensor | None = None


class ContextStates:
    """Computes the states at answer positions with any edit, including one that depends on the prompt."""

    def __init__(self, rows: RowStates, text: Text) -> None:
        self.rows, self.text = rows, text
        self.prefix, self.applied, self.forward = rows.prefix, rows.applied, rows.forward

    def routes(self, edit: PromptEdit, rows: Tensor | None, batch: TokenBatch) -> list[Route]:
        """Routes the rows of a batch: first those outside of all scopes, then those in scope of an entry."""
        index, prompts = self.applied.index(edit, rows, len(batch)).tolist(), batch.prompts()
        places: dict[tuple[int, ...], int] = {}  # number of each distinct pair of edit and prompt
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
        """Routes prompts, given as token ids, under the prompt-dependent edit that is applied now."""
        if self.applied.prompt_edit is None:
            return [Route(torch.arange(len(prompts)))]
        edit, rows = self.applied.prompt_edit
        return self.routes(edit, rows, rows_of(prompts).to(self.forward.device))

    def shared(
        self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int | None
    ) -> tuple[Tensor, Tensor]:
        """Computes the distinct states, [nodes, hidden], and the index of each answer position's state, [positions]."""
        if edit is None and self.applied.prompt_edit is not None:
            edit, rows = self.applied.prompt_edit
            start = start or 0  # out of scope, bit-identical to the unedited model
        elif edit is not None and edit.is_identity:
            edit = rows = None  # bit-identical to the unedited model
        if start is None:
            start = self.applied.sites.first_block(edit.sites) if edit is not None else 0
        if not isinstance(edit, PromptEdit):
            return self.rows.shared(batch, edit, rows, start)
        states = self._routed(batch, edit, rows, start)
        return states, torch.arange(len(states), device=states.device)

    def _routed(self, batch: TokenBatch, edit: PromptEdit, rows: Tensor | None, start: int) -> Tensor:
        """Computes the states of rows, each processed as its prompt determines."""
        routes = self.routes(edit, rows, batch)

        def run(route: Route) -> Tensor:
            part = batch.select(route.rows)
            if route.contexts is not None:
                part = part.behind(route.contexts, self.forward.max_length, self.text.opening)
            states, node = self.rows.shared(part, route.edit, route.numbers, start)
            return take_rows(states, node)

        return in_order(batch, [route.rows for route in routes], [run(route) for route in routes])

    def scope_embedding(self, batch: TokenBatch, block: int) -> Tensor:
        """Embeds each row's prompt for a gate: the states that enter a block, at the prompt's last token and averaged.

        Returns:
            [rows, 2 · hidden]; the answers do not contribute.
        """
        return PromptStates(self, batch.prompts())(block)


class PromptStates:
    """The states of prompts that gates read (see `edits.Prompts`).

    Args:
        context: Computes states.
        prompts: Rows without answers.
        rows: The same rows with answers, if their states are known anyway: those of the prompt are the same up to
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
        """Returns the states of prompts, [prompts, seq, hidden], and the mask of their tokens, bool [prompts, seq]."""
        hidden, there = self._read(block)
        return F.layer_norm(hidden, hidden.shape[-1:]), there.bool()

    def _read(self, block: int) -> tuple[Tensor, Tensor]:
        hidden = self.prefix.of(self.rows, block)[:, : self.prompts.input_ids.shape[1]].float()
        return hidden, self.prompts.attention_mask.to(hidden.device)
