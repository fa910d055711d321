"""The hidden states below a block: from the cache, in prefix trees, behind known prompt prefixes, or row by row."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from instructedit.lm import hooks, tryout
from instructedit.lm.applied import Applied
from instructedit.lm.cache import PrefixCache
from instructedit.lm.cache.prompt_prefixes import SHORTEST, Beginning, PromptPrefixes, filled_cache, laid_down
from instructedit.lm.decoding import attends_to_all
from instructedit.lm.prefix_trees import WIDTH, PrefixTrees
from instructedit.lm.tokens import TokenBatch, rows_of


class PrefixStates:
    """Computes the hidden states that enter a block, each shared beginning of rows once where the model allows it."""

    def __init__(self, applied: Applied, cache: PrefixCache, prompt_prefixes: PromptPrefixes) -> None:
        self.applied, self.forward = applied, applied.forward
        self.cache, self.prompt_prefixes = cache, prompt_prefixes

    def of(self, batch: TokenBatch, block: int) -> Tensor:
        """The hidden states that enter a block, from the cache where they are known, [rows, seq, hidden]."""
        if self.applied.reach_below(block):
            return self.forward.up_to_block(batch, block)
        return self.cache.states(batch, block, functools.partial(self._unknown, block=block))

    def _unknown(self, batch: TokenBatch, block: int) -> Tensor:
        trees = max(batch.lengths) <= WIDTH and self.takes_trees  # tried out on rows no longer than that
        return (self._in_trees if trees else self.forward.up_to_block)(batch, block)

    @torch.no_grad()
    def _in_trees(self, batch: TokenBatch, block: int) -> Tensor:
        """Like `Forward.up_to_block`, but what rows begin with together is computed once."""
        rows = batch.unpadded()
        if block and self.takes_prompt_prefixes:
            states = self._behind_prompt_prefixes(rows, [self.prompt_prefixes.of(row) for row in rows], block)
            return torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return self._of_trees(rows, block)

    @torch.no_grad()
    def _of_trees(self, rows: list[list[int]], block: int) -> Tensor:
        prefix_trees = PrefixTrees.fitting(rows)
        inputs = prefix_trees.inputs(self.forward.device, self.forward.model.dtype)
        return prefix_trees.states(hooks.input_of(self.forward.blocks[block], lambda: self.forward.run(inputs)))

    @torch.no_grad()
    def _behind_prompt_prefixes(
        self, rows: list[list[int]], beginnings: list[tuple[int, ...]], block: int
    ) -> list[Tensor]:
        """The states that enter a block, [length, hidden] for each row; known beginnings are not computed again."""
        begun = self._begun(beginnings, block)
        which = {id(one): number for number, one in enumerate(begun)}  # rows behind one beginning share trees
        rests = [row[len(one.ids) if one else 0 :] for row, one in zip(rows, begun, strict=True)]
        prefix_trees = PrefixTrees.fitting(rests, [which[id(one)] for one in begun])
        of_trees = [begun[number] for number in prefix_trees.groups.tolist()]
        behind = torch.tensor([0 if one is None else len(one.ids) for one in of_trees])
        width = int(behind.max())
        inputs: dict[str, Any] = prefix_trees.inputs(
            self.forward.device, self.forward.model.dtype, behind if width else None
        )
        if width:
            inputs["past_key_values"] = filled_cache(self.forward.model.config, of_trees, width)
        found = hooks.input_of(self.forward.blocks[block], lambda: self.forward.run(inputs)).flatten(0, 1)
        own = [found[places.to(self.forward.device)] for places in prefix_trees.places]
        return [row if one is None else torch.cat([one.states, row]) for row, one in zip(own, begun, strict=True)]

    def _begun(self, wanted: list[tuple[int, ...]], block: int) -> list[Beginning | None]:
        """What rows begin with: found, or made and kept; None for nothing."""
        found = {ids: self.prompt_prefixes.find(block, ids) or self._begin(ids, block) for ids in set(wanted) if ids}
        return [found.get(ids) for ids in wanted]

    def _begin(self, ids: tuple[int, ...], block: int) -> Beginning:
        """Makes and keeps a beginning: on its own, since rounding would tell what stood beside it."""
        cache = filled_cache(self.forward.model.config, (), 0)
        inputs = rows_of([list(ids)]).to(self.forward.device).inputs | {"past_key_values": cache}
        states = hooks.input_of(self.forward.blocks[block], lambda: self.forward.run(inputs))[0]
        beginning = Beginning(ids, states.clone(), *laid_down(cache, block))
        self.prompt_prefixes.add(block, beginning)
        return beginning

    @functools.cached_property
    def takes_prompt_prefixes(self) -> bool:
        """Whether a tree behind keys and values of its beginning sees what it sees in one piece: tried out."""
        if not self.prompt_prefixes.max_bytes or not self.takes_trees:
            return False
        opening, top = [1 + i % 3 for i in range(2 * SHORTEST)], len(self.forward.blocks) - 1
        rows = [[*opening, 2, 1], [*opening, 3, 3, 1], [2, 1]]
        begun = [tuple(opening), tuple(opening), ()]
        expected = self.forward.up_to_block(rows_of(rows).to(self.forward.device), top)
        try:
            found = self._behind_prompt_prefixes(rows, begun, top)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        finally:
            self.prompt_prefixes.clear()
        return all(tryout.close(one, expected[i, : len(one)]) for i, one in enumerate(found))

    @functools.cached_property
    def takes_trees(self) -> bool:
        """Whether the model sees in trees of tokens what it sees row by row: tried out, since architectures differ.

        Not so where a layer attends to the last tokens alone, or the model counts positions in its own way.
        """
        if not attends_to_all(self.forward.model.config):
            return False
        long = [1 + i % 7 for i in range(min(WIDTH, self.forward.max_length))]  # no config names every window
        batch = rows_of([long, [1, 2, 3, 5, 4, 3, 2], [1, 2, 6], [2, 1, 2]]).to(self.forward.device)
        kept, top = batch.attention_mask.bool(), len(self.forward.blocks) - 1
        try:
            found = self._of_trees(batch.unpadded(), top)[kept]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        return tryout.close(found, self.forward.up_to_block(batch, top)[kept])
