"""Forward passes of a frozen model: as a whole, up to a block, from a block on, and its head alone."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from instructedit.lm import hooks, tryout
from instructedit.lm.sites import (
    find_blocks,
)
from instructedit.lm.small_batch import small_batch_matmul
from instructedit.lm.tokens import TokenBatch


class Forward:
    """Runs a frozen model or a part of it, without its trainer's autocast.

    Args:
        model: A transformers model in eval mode.
        max_length: Maximum number of tokens in a row.
        activation_checkpointing: Keep only the inputs of the blocks that run; a backward pass runs these again.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, activation_checkpointing: bool = False) -> None:
        self.model = model
        self.max_length = max_length
        self.activation_checkpointing = activation_checkpointing
        self._resumable: dict[int, bool] = {}

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return find_blocks(self.model)[1]

    def block_name(self, number: int) -> str:
        """Returns the module name of a block."""
        return f"{self._blocks_name}.{number}"

    @functools.cached_property
    def _blocks_name(self) -> str:
        return find_blocks(self.model)[0]

    @functools.cached_property
    def outputs_of_a_block(self) -> int:
        """Number of values that a block returns: 0 for a bare tensor, else the length of its tuple."""
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        return hooks.values_of(self.blocks[0], lambda: self.model(input_ids=one, attention_mask=one, use_cache=False))

    def resumed_from(self, block: int) -> int:
        """Returns `block` if a forward pass can be resumed there from its input alone, else 0: all blocks must run."""
        if block and block not in self._resumable:
            with hooks.bare(self.model.modules()):
                self._resumable[block] = tryout.resumes(self.model, self.blocks, block, self.outputs_of_a_block)
        return block if self._resumable.get(block) else 0

    @torch.no_grad()
    def up_to_block(self, batch: TokenBatch, block: int, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """Computes the hidden states that enter a block, row by row, [rows, seq, hidden]; from `hidden` at `start`."""
        with hooks.resumed(self.blocks, start, hidden, self.outputs_of_a_block if hidden is not None else 0):
            return hooks.input_of(self.blocks[block], lambda: self.run(batch.inputs))

    def run(self, inputs: dict[str, Any]) -> Any:
        """Runs the model in the dtype of its weights; with a cache only if the inputs bring one."""
        with self.no_autocast():
            return self.model(**inputs, use_cache="past_key_values" in inputs)

    def no_autocast(self) -> torch.autocast:
        """Turns a trainer's autocast off, since cached states must not depend on who asked first."""
        return torch.autocast(self.device.type, enabled=False)

    def from_block(self, inputs: dict[str, Tensor], start: int, hidden: Tensor | None) -> Tensor:
        """Computes the last block's output, [rows, seq, hidden], from `hidden` at block `start`, or from the tokens."""
        running = self.blocks[start:] if self.activation_checkpointing else ()
        with hooks.activation_checkpointed(running), hooks.resumed(self.blocks, start, hidden, self.outputs_of_a_block):
            return hooks.output_of(self.blocks[-1], lambda: self.run(inputs))

    def head(self, states: Tensor) -> Tensor:
        """Computes the logits of states that left the last block, [positions, hidden] → [positions, vocab].

        It runs the model's own final norm, head, and anything else that follows its blocks.
        """
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
        bare = hooks.bare(self.blocks)
        uncounted = hooks.hooked({self.model: {"_forward_pre_hooks": OrderedDict()}})  # these are no rows of an edit
        resumed = hooks.resumed(self.blocks, len(self.blocks), states.unsqueeze(1), self.outputs_of_a_block)
        with bare, uncounted, resumed, self.no_autocast(), small_batch_matmul([self.model.get_output_embeddings()]):
            logits: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits.squeeze(1)
