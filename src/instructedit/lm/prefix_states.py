"""Hidden states that enter a block: from the cache, computed after known prompt prefixes, or row by row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instructedit.lm import hooks, tryout
from instructedit.lm.applied import Applied
from instructedit.lm.cache import PrefixCache
from instructedit.lm.cache.prompt_prefixes import SHORTEST, Beginning, PromptPrefixes, filled_cache, laid_down
from instructedit.lm.decoding import attends_to_all
from instructedit.lm.prefix_trees import WIDTH, PrefixTrees
from instructedit.lm.tokens import TokenBatch, alike, rounded_up, rows_of

#: Keys and values of a prompt prefix are padded to a multiple of this many tokens.
BEHIND = 32
#: Maximum number of tokens in a pass, including those of prompt prefixes: more make it no faster, and their keys and
#: values take memory.
PASS = {"cpu": 2048, "gpu": 16384}


class PrefixStates:
    """Computes the hidden states that enter a block; prompt prefixes that rows share are computed once if possible.

    A row is computed in a pass of rows of its own shape (`TokenBatch.in_shapes`). So on a CPU its states are
    bit-identical whatever other rows are computed with it, and a run that resumes with an empty cache gives the results
    of an uninterrupted one. Where that does not matter, rows may share their common beginnings instead (a prompt and
    its aliases are mostly prompt); states that are computed this way are cached for such calls alone.

    Attributes:
        stages: Blocks whose inputs will be asked for as well: a pass to a higher block starts from the states that
            enter the highest of them, which are cached.
    """

    def __init__(self, applied: Applied, cache: PrefixCache, prompt_prefixes: PromptPrefixes) -> None:
        self.applied, self.forward = applied, applied.forward
        self.cache, self.prompt_prefixes = cache, prompt_prefixes
        self.stages: set[int] = set()

    @property
    def pass_tokens(self) -> int:
        """Maximum number of tokens in a forward pass."""
        return PASS["cpu" if self.forward.device.type == "cpu" else "gpu"]

    def of(self, batch: TokenBatch, block: int, together: bool = False) -> Tensor:
        """Returns the hidden states that enter a block, from the cache where they are known, [rows, seq, hidden].

        Args:
            batch: Rows of tokens.
            block: Number of the block.
            together: Unknown rows may share their common beginnings: less work, but their rounding then depends on the
                other unknown rows, so not in training.
        """
        if self.applied.reach_below(block):
            return self.forward.up_to_block(batch, block)
        if together and self._takes_together(batch, block):
            return self.cache.states(batch, block, lambda part: self._of_trees(part.unpadded(), block), apart=True)
        return self.cache.states(batch, block, functools.partial(self._unknown, block=block))

    def warm(self, batches: Sequence[TokenBatch], block: int) -> None:
        """Computes and caches the states of several batches in joint passes; does nothing if there is no room."""
        rows = TokenBatch.cat(batches)
        width = self.applied.sites.width * self.forward.model.dtype.itemsize
        if block and self.cache.has_room(sum(rows.lengths) * width) and not self.applied.reach_below(block):
            self.of(rows, block)

    def _takes_together(self, batch: TokenBatch, block: int) -> bool:
        """True if the batch's rows can be computed in trees, and their states are not to be kept on disk."""
        alone = self.cache.disk or not block or len(batch) == 1
        return not alone and max(batch.lengths) <= WIDTH and self.takes_trees

    @torch.no_grad()
    def _unknown(self, batch: TokenBatch, block: int) -> Tensor:
        """Computes the same states as `Forward.up_to_block`, but does not compute known prompt prefixes again."""
        rows = batch.unpadded()
        begun = self._begun(rows, block)
        sizes = [len(one.ids) if one else 0 for one in begun]
        shapes = [
            (rounded_up(behind, BEHIND), rounded_up(len(row) - behind)) for row, behind in zip(rows, sizes, strict=True)
        ]
        states: list[Tensor] = [torch.empty(0)] * len(rows)
        for shape, part in alike(shapes, self.pass_tokens):
            found = self._pass([rows[i][sizes[i] :] for i in part], [begun[i] for i in part], shape, block)
            for i, own in zip(part, found, strict=True):
                one, own = begun[i], own[: len(rows[i]) - sizes[i]]
                states[i] = own if one is None else torch.cat([one.states, own])
        return batch.padded(states)

    def _pass(
        self, rests: list[list[int]], begun: list[Beginning | None], shape: tuple[int, int], block: int
    ) -> Tensor:
        """Computes the states of tokens that follow beginnings (or of whole rows), [rows, width, hidden].

        Args:
            rests: Token ids that follow each beginning.
            begun: The beginning of each row; None for a whole row.
            shape: Numbers of tokens that beginnings and rests are padded to.
            block: Number of the block that the states enter.
        """
        behind, width = shape
        batch = rows_of(rests, min(width, self.forward.max_length)).to(self.forward.device)
        if not behind:
            return self._by_stages(batch, block)
        sizes = torch.tensor([0 if one is None else len(one.ids) for one in begun])
        before = (torch.arange(behind) < sizes[:, None])[:, None].expand(-1, width, -1)
        own = torch.ones(width, width, dtype=torch.bool).tril().expand(len(rests), -1, -1)
        dtype = self.forward.model.dtype
        mask = torch.zeros(len(rests), 1, width, behind + width, dtype=dtype)
        mask.masked_fill_(~torch.cat([before, own], -1)[:, None], torch.finfo(dtype).min)
        positions = (sizes[:, None] + torch.arange(width)).clamp(max=self.forward.max_length - 1)
        inputs: dict[str, Any] = {
            "input_ids": batch.inputs["input_ids"],
            "position_ids": positions.to(self.forward.device),
            "attention_mask": mask.to(self.forward.device),
            "past_key_values": filled_cache(begun, behind),
        }
        return hooks.input_of(self.forward.blocks[block], lambda: self.forward.run(inputs))

    def _by_stages(self, batch: TokenBatch, block: int) -> Tensor:
        """Computes the states of whole rows from those that enter the highest stage below the block."""
        stage = max((stage for stage in self.stages if stage < block), default=0)
        # Disks may round states, and there is no use in states that are not kept.
        if self.cache.disk or not self.cache.has_room(1) or not self.forward.resumed_from(stage):
            return self.forward.up_to_block(batch, block)
        return self.forward.up_to_block(batch, block, stage, self.of(batch, stage))

    def _begun(self, rows: list[list[int]], block: int) -> list[Beginning | None]:
        """Returns the known beginning of each row, computing those that are new; None for a row without one."""
        if not block or not self.takes_prompt_prefixes:
            return [None] * len(rows)
        wanted = [
            self.prompt_prefixes.of(row) if len(row) <= WIDTH else () for row in rows
        ]  # longer ones were not tested
        found = {ids: self.prompt_prefixes.find(block, ids) or self._begin(ids, block) for ids in set(wanted) if ids}
        return [found.get(ids) for ids in wanted]

    def _begin(self, ids: tuple[int, ...], block: int) -> Beginning:
        """Computes and caches a beginning, in a pass of its own since rounding depends on the rows beside it."""
        cache = filled_cache((), 0)
        inputs = rows_of([list(ids)]).to(self.forward.device).inputs | {"past_key_values": cache}
        states = hooks.input_of(self.forward.blocks[block], lambda: self.forward.run(inputs))[0]
        beginning = Beginning(ids, states.clone(), *laid_down(cache, block))
        self.prompt_prefixes.add(block, beginning)
        return beginning

    @functools.cached_property
    def takes_prompt_prefixes(self) -> bool:
        """True if rows that follow a cached beginning get the same states as whole rows, found by a test run."""
        if not self.prompt_prefixes.max_bytes or not self.takes_trees:
            return False
        opening, top = self._spread([1 + i % 3 for i in range(2 * SHORTEST)]), len(self.forward.blocks) - 1
        rests = [self._spread(rest) for rest in ([2, 1], [3, 3, 1], [2, 1])]
        rows, behind = [opening + rests[0], opening + rests[1], rests[2]], [len(opening), len(opening), 0]
        with self.applied.suspended(), torch.no_grad():
            expected = self.forward.up_to_block(rows_of(rows).to(self.forward.device), top)
            try:
                one = self._begin(tuple(opening), top)
                shape = (rounded_up(len(opening), BEHIND), rounded_up(1))
                found = self._pass(rests, [one, one, None], shape, top)
            except (TypeError, ValueError, RuntimeError, IndexError):
                return False
            finally:
                self.prompt_prefixes.clear()
        return all(
            tryout.close(own[: len(row) - size], whole[size : len(row)])
            for own, whole, row, size in zip(found, expected, rows, behind, strict=True)
        )

    @functools.cached_property
    def takes_trees(self) -> bool:
        """True if rows in prefix trees get the same states as row by row, found by a test run as architectures vary.

        It is False if a layer attends to the last tokens alone, or the model counts positions in its own way.
        """
        if not attends_to_all(self.forward.model.config, WIDTH):
            return False
        long = [1 + i % 7 for i in range(min(WIDTH, self.forward.max_length))]  # configs do not name every window
        rows = [self._spread(row) for row in (long, [1, 2, 3, 5, 4, 3, 2], [1, 2, 6], [2, 1, 2])]
        batch = rows_of(rows).to(self.forward.device)
        kept, top = batch.attention_mask.bool(), len(self.forward.blocks) - 1
        with self.applied.suspended():
            try:
                found = self._of_trees(batch.unpadded(), top)[kept]
            except (TypeError, ValueError, RuntimeError, IndexError):
                return False
            return tryout.close(found, self.forward.up_to_block(batch, top)[kept])

    def _spread(self, tokens: list[int]) -> list[int]:
        return tryout.spread(tokens, self.forward.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def _of_trees(self, rows: list[list[int]], block: int) -> Tensor:
        prefix_trees = PrefixTrees.fitting(rows)
        inputs = prefix_trees.inputs(self.forward.device, self.forward.model.dtype)
        return prefix_trees.read_once(rows).states(
            hooks.input_of(self.forward.blocks[block], lambda: self.forward.run(inputs))
        )
