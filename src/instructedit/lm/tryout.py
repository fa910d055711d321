"""What the engine takes for granted of a model, tried out on two short rows, since architectures differ."""

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
    """Whether two ways of computing the same agree but for rounding.

    In bfloat16 rounding is 2 % of what leaves the last block of a small LM, and a token less in front of it 7 to 30 %.
    """
    gap = (found.float() - expected.float()).norm()
    return bool(gap <= expected.float().norm() * min(0.05, torch.finfo(found.dtype).eps ** 0.5))


def spread(tokens: Sequence[int], vocabulary: int) -> list[int]:
    """Small numbers as token ids from all over a vocabulary.

    The first ids are often special ones, at which states are so large that rounding them hides everything.
    """
    return [7919 * (1 + token) % vocabulary for token in tokens]


@torch.no_grad()
def check(model: PreTrainedModel, blocks: nn.ModuleList, head: Callable[[Tensor], Tensor]) -> None:
    """Whether each position sees those before it alone, and the logits are made of what leaves the last block.

    Args:
        model: The model.
        blocks: Its blocks.
        head: Makes logits of states that left the last block, [positions, hidden] → [positions, vocab].

    Raises:
        UserError: If not.
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
    """Whether the blocks from `start` need nothing of those below but the hidden states (keys and values, for one)."""
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
    """What the model is called with: two short rows."""
    ids = torch.tensor(ROWS, device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
