"""Greedy decoding of prompts in prefix trees: common beginnings of prompts with the same edit are read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm.applied import Applied
from instructedit.lm.decoding import preallocated_cache
from instructedit.lm.prefix_trees import WIDTH, PrefixTrees
from instructedit.lm.small_batch import small_batch_matmul

#: Maximum number of rows in a branch of a tree (see `TreeDecoder`).
BRANCH = 8


@torch.no_grad()
def continue_trees(
    applied: Applied, prompts: list[list[int]], lengths: Sequence[int], ends: Sequence[int], edit: Edit | None = None,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Finds the most likely tokens after prompts in prefix trees, each of which holds prompts of one edit.

    Args:
        applied: Applies the edits to the model.
        prompts: Token ids.
        lengths: Maximum number of new tokens of each.
        ends: Tokens that end a text.
        edit: The edits.
        rows: Which edit each prompt has; by default prompt i edit i, or all the only one.
    """
    forward = applied.forward
    one = edit is None or len(edit) == 1
    index = None if edit is None or one else applied.index(edit, applied.named(edit, rows), len(prompts))
    prefix_trees = PrefixTrees.fitting(prompts, None if index is None else index.tolist())
    cache = preallocated_cache(forward.model.config, prefix_trees.ids.shape[1] + BRANCH * max(lengths), longest=WIDTH)

    def run(inputs: dict[str, Any], trees: Tensor) -> Tensor:
        with applied.at_layers(edit, None if one else prefix_trees.groups[trees].to(forward.device)):
            return forward.from_block(inputs, 0, None)

    with small_batch_matmul(forward.model.modules()):
        decoder = TreeDecoder(prefix_trees, run, forward.head, cache, forward.model.dtype, forward.device)
        return decoder(lengths, ends)


class TreeDecoder:
    """Continues prompts token by token, each new token a leaf of its prompt's tree.

    Once the prompts are read, a tree is split into branches with a few of its rows each, those that end soonest
    together: all trees of a step are padded to the one with most new tokens, and those whose rows have all ended are
    dropped.

    Args:
        prefix_trees: The prompts' trees.
        forward: Maps a model's inputs, and the trees that they belong to, [rows], to the states that leave its last
            block, [rows, tokens, hidden]; the model has the cache and the edits that these trees are to have.
        head: Maps states, [positions, hidden], to logits.
        cache: An empty cache of keys and values.
        dtype: Dtype of the model.
        device: Device of the model.
    """

    def __init__(
        self, prefix_trees: PrefixTrees, forward: Callable[[dict[str, Any], Tensor], Tensor],
        head: Callable[[Tensor], Tensor], cache: Any, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.prefix_trees, self.forward, self.head, self.cache = prefix_trees, forward, head, cache
        self.dtype, self.device = dtype, device
        width = prefix_trees.ids.shape[1]
        self._trees = torch.arange(len(prefix_trees.ids))  # those in the cache
        self._place: list[int] = prefix_trees.of_rows.tolist()  # index of each row's tree in it
        self._sees = torch.zeros(
            len(prefix_trees.places), width, dtype=torch.bool
        )  # which of all cached tokens each row attends to
        for row, places in zip(self._sees, prefix_trees.places, strict=True):
            row[places % width] = True

    @torch.no_grad()
    def __call__(self, max_new_tokens: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
        """Generates the token ids that follow each prompt, including the one that ends the text.

        Args:
            max_new_tokens: Maximum number of new tokens of each row.
            ends: Tokens that end a text.

        Raises:
            UserError: If the model's logits are NaN.
        """
        inputs = self.prefix_trees.inputs(self.device, self.dtype) | {"past_key_values": self.cache}
        states = self.forward(inputs, self._trees)
        lasts = torch.stack([places[-1] for places in self.prefix_trees.places]).to(self.device)
        new: list[list[int]] = [[] for _ in max_new_tokens]
        live, stops = list(range(len(max_new_tokens))), set(ends)
        chosen = self._chosen(states.flatten(0, 1)[lasts])
        self._branch(max_new_tokens)
        while live:
            for i, token in zip(live, chosen, strict=True):
                new[i].append(token)
            live = [i for i in live if len(new[i]) < max_new_tokens[i] and new[i][-1] not in stops]
            if live:
                self._drop_ended(live)
                chosen = self._step(live, new)
        return new

    def _branch(self, max_new_tokens: Sequence[int]) -> None:
        """Splits each tree into branches of at most `BRANCH` rows."""
        origin: list[int] = []
        filled: dict[int, int] = {}  # rows of each tree's last branch
        last: dict[int, int] = {}
        for row in sorted(range(len(max_new_tokens)), key=lambda row: max_new_tokens[row]):
            tree = self._place[row]
            if filled.setdefault(tree, BRANCH) == BRANCH:
                filled[tree], last[tree] = 0, len(origin)
                origin.append(tree)
            filled[tree] += 1
            self._place[row] = last[tree]
        self._keep(origin)

    def _drop_ended(self, live: list[int]) -> None:
        """Drops the trees whose rows have all ended, if they are many, since the remaining ones are copied."""
        kept = sorted({self._place[row] for row in live})
        if len(kept) <= 0.75 * len(self._trees):
            place = {old: number for number, old in enumerate(kept)}
            for row in live:
                self._place[row] = place[self._place[row]]
            self._keep(kept)

    def _keep(self, which: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(which, device=self.device))
        self._trees = self._trees[which]

    def _step(self, live: list[int], new: list[list[int]]) -> list[int]:
        """Reads the last new token of each row that continues, and returns the next ones."""
        slots = [0] * len(self._trees)
        at = []
        for i in live:
            at.append((self._place[i], slots[self._place[i]]))
            slots[self._place[i]] += 1
        trees, places = (torch.tensor(part) for part in zip(*at, strict=True))
        wide = max(slots)
        ids = torch.zeros(len(slots), wide, dtype=torch.long)
        positions = torch.zeros_like(ids)
        ids[trees, places] = torch.tensor([new[i][-1] for i in live])
        positions[trees, places] = torch.tensor([len(self.prefix_trees.places[i]) + len(new[i]) - 1 for i in live])
        own = torch.zeros(len(self._sees), wide, dtype=torch.bool)
        own[live, places] = True
        self._sees = torch.cat([self._sees, own], -1)
        sees = torch.zeros(*ids.shape, self._sees.shape[1], dtype=torch.bool)
        sees[:, :, -wide:] = torch.eye(wide, dtype=torch.bool)  # an empty slot sees itself
        sees[trees, places] = self._sees[live]
        mask = torch.zeros(sees.shape, dtype=self.dtype).masked_fill_(~sees, torch.finfo(self.dtype).min)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask.unsqueeze(1)}
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        states = self.forward(inputs | {"past_key_values": self.cache}, self._trees)
        return self._chosen(states[trees.to(self.device), places.to(self.device)])

    def _chosen(self, states: Tensor) -> list[int]:
        logits = self.head(states)
        if logits.amax(-1).isnan().any():
            raise UserError("the model's logits are not numbers (NaN): no text can be made of them")
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens
