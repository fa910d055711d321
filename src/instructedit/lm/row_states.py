"""States that leave the last block at answer positions, for rows without a prompt prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instructedit.edits import Edit
from instructedit.lm.prefix_states import PrefixStates
from instructedit.lm.prefix_trees import WIDTH, PrefixTrees
from instructedit.lm.tokens import TokenBatch


class RowStates:
    """Computes the states that leave the last block, row by row, by length, or in prefix trees."""

    def __init__(self, prefix: PrefixStates) -> None:
        self.prefix, self.applied, self.forward = prefix, prefix.applied, prefix.forward

    def shared(self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        """Computes the distinct states at answer positions, and the index of each position's state among these."""
        if (prefix_trees := self._prefix_trees(batch, edit, rows)) is not None:
            return self._states_of_trees(batch, prefix_trees, edit, start)
        states = self._states_by_length(batch, edit, rows, start)
        return states, torch.arange(len(states), device=states.device)

    def _prefix_trees(self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None) -> PrefixTrees | None:
        """Arranges rows in trees of one edit each, if the model takes trees and these have fewer tokens; else None."""
        # Edits that a caller has applied expect the rows of the batch as it is.
        if (
            self.applied
            or len(batch) == 1
            or max(batch.lengths) > WIDTH
            or not (edit is None or edit.positionwise)
            or not self.prefix.takes_trees
        ):
            return None
        index = None if edit is None or len(edit) == 1 else self.applied.index(edit, rows, len(batch)).tolist()
        prefix_trees = PrefixTrees.fitting(batch.unpadded(), index)
        padded = sum(len(group) * max(batch.lengths[i] for i in group.tolist()) for group in batch.by_length())
        return prefix_trees if prefix_trees.padded_tokens < padded else None

    def _states_of_trees(
        self, batch: TokenBatch, prefix_trees: PrefixTrees, edit: Edit | None, start: int
    ) -> tuple[Tensor, Tensor]:
        start = self.forward.resumed_from(start)
        hidden = prefix_trees.gather(self.prefix.of(batch, start, not torch.is_grad_enabled())) if start else None
        rows = None if edit is None or len(edit) == 1 else prefix_trees.groups.to(self.forward.device)
        with self.applied.at_layers(edit, rows):
            found = self.forward.from_block(
                prefix_trees.inputs(self.forward.device, self.forward.model.dtype), start, hidden
            )
        at, node = prefix_trees.at(*batch.places).unique(return_inverse=True)
        return found.flatten(0, 1)[at.to(self.forward.device)], node.to(self.forward.device)

    def _states_by_length(self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int) -> Tensor:
        groups = batch.by_length()
        if len(groups) == 1 or self.applied.layers:
            return self.of(batch, edit, rows, start)
        index = None if edit is None else self.applied.index(edit, rows, len(batch))

        def run(group: Tensor) -> Tensor:
            mine = None if index is None else index[group.to(self.forward.device)]
            return self.of(batch.select(group), edit, mine, start)

        return in_order(batch, groups, [run(group) for group in groups])

    def of(self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int) -> Tensor:
        """Computes the states at answer positions in one forward pass of all rows, [positions, hidden]."""
        start = self.forward.resumed_from(start)
        hidden = self.prefix.of(batch, start) if start else None
        with self.applied.at_layers(edit, rows):
            return self.forward.from_block(batch.inputs, start, hidden)[batch.answer_at]


def in_order(batch: TokenBatch, groups: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Puts states of answer positions, computed for groups of rows (each ascending), back in the batch's order."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))[batch.in_order(groups)]
