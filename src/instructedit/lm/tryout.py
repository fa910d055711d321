"""Tests of what the engine assumes about a model, run on two short rows, since architectures differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from instructedit.errors import UserError
from instructedit.lm import hooks

#: Two rows that begin alike, and how many of their tokens are the same.
ROWS, SHARED = [[3, 1, 4, 1, 5, 9], [3, 1, 4, 1, 6, 2]], 4


def close(found: Tensor, expected: Tensor) -> bool:
    """True if two results of the same computation agree up to rounding.

    In bfloat16, rounding changes the last block's output of a small LM by 2 %, and one token less in front by 7 to
    30 %.
    """
    gap = (found.float() - expected.float()).norm()
    return bool(gap <= expected.float().norm() * min(0.05, torch.finfo(found.dtype).eps ** 0.5))


def spread(tokens: Sequence[int], vocabulary: int) -> list[int]:
    """Maps small numbers to token ids that are spread over a vocabulary.

    The first ids are often special tokens, whose states are so large that rounding them hides everything else.
    """
    return [7919 * (1 + token) % vocabulary for token in tokens]


@torch.no_grad()
def check(model: PreTrainedModel, blocks: nn.ModuleList, head: Callable[[Tensor], Tensor]) -> None:
    """Checks that positions see only those before them, and that logits depend only on the last block's output.

    Args:
        model: The model.
        blocks: Its blocks.
        head: Computes logits of states that left the last block, [positions, hidden] → [positions, vocab].

    Raises:
        UserError: If either does not hold, or the logits are NaN.
    """
    kind, given = type(model).__name__, inputs(model)
    left = hooks.output_of(blocks[-1], lambda: model(**given))
    if not (left.isnan().any() or close(left[0, :SHARED], left[1, :SHARED])):
        raise UserError(f"{kind}: positions see what follows them; only causal language models can be edited")
    try:
        found = head(left[0])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{kind}: its head cannot be asked for single positions ({error}); it cannot be edited"
        ) from error
    logits = model(**given).logits[0]
    if logits.isnan().any():
        raise UserError(
            f"{kind}: its logits are not numbers (NaN); are its weights damaged, or too large for the dtype?"
        )
    if not close(found, logits):
        raise UserError(f"{kind}: its logits are made of more than what leaves its last block; it cannot be edited")


@torch.no_grad()
def resumes(model: PreTrainedModel, blocks: nn.ModuleList, start: int, values: int) -> bool:
    """True if the blocks from `start` need only hidden states of those below, and not their keys and values, say."""
    given = inputs(model)

    def run() -> Any:
        return model(**given)

    entered, expected = hooks.input_of(blocks[start], run), hooks.output_of(blocks[-1], run)
    try:
        with hooks.resumed(blocks, start, entered, values):
            found = hooks.output_of(blocks[-1], run)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return False
    return close(found, expected)


def inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the inputs of a model for two short rows of tokens."""
    ids = torch.tensor(ROWS, device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
