"""LocFT-BF: plain fine-tuning of one well-chosen matrix, breadth first (Yang et al. 2026)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from instructedit.data.batch import RequestBatch
from instructedit.editors.ft_l import FtL
from instructedit.editors.optimisation import Values
from instructedit.editors.options import options
from instructedit.edits import DenseEdit, Edit
from instructedit.errors import UserError
from instructedit.lm import TokenBatch

#: Stands for the loss of a mini-batch that has not been seen yet: any mean that includes it is high.
_UNKNOWN = 1e9


@options
class LocFt(FtL):
    """Fine-tunes the MLP's output projection of one upper block on whole answers, without a bound, as in training.

    The paper corrects what fine-tuning as an editing baseline did wrong: many requests are trained in epochs of
    mini-batches (breadth first) instead of one after the other, each to its end; the token that ends a text is part of
    the answer; and the matrix is well chosen, an output projection two thirds up. The optimiser is Adam; an epoch takes
    one step on each mini-batch of ``editor.edit(requests, together=True)``, in the order of the requests. A request
    alone takes one step per epoch. Training stops when the mean loss is below 1e-2.

    Defaults: block 22 of LLaMA-3-8B's 32, 25 epochs, mini-batches of 100. The paper's rate for it is 5e-4; as weights
    differ by a factor of ten between models, the default is FT-L's share of their size.

    Args:
        bound: Largest change of any weight; None: no bound.
        ends: Teach the model to end its text after a target.
        batch_size: Requests in a mini-batch.
    """

    name: ClassVar[str] = "loc_ft"
    PAPER_BLOCKS = ((22,), 32)
    REMEDY = "a larger lr, or more steps"

    bound: float | Literal["auto"] | None = None
    ends: bool = True
    batch_size: int = 100
    blocks: Sequence[int] | None = None

    def build(self) -> None:
        """Sets up the tokenization, which appends the end-of-text token to targets if `ends` is set.

        Raises:
            UserError: If the mini-batch size is less than one, or the tokenizer has no end-of-text token.
        """
        if self.batch_size < 1:
            raise UserError(f"editor {self.name!r}: batch_size must be at least 1, got {self.batch_size}")
        self._tokenization = self.lm.text.ended(self.ends)

    def compute_joint_edit(self, batch: RequestBatch) -> DenseEdit:
        """Tunes one ΔW on mini-batches of the requests in turn."""
        parts = [batch.tokens.select(rows) for rows in torch.arange(len(batch)).split(self.batch_size)]
        return self._tuned(breadth_first(self._loss(), parts), 1, len(parts))


def breadth_first(
    loss: Callable[[TokenBatch, Edit], Tensor], parts: Sequence[TokenBatch]
) -> Callable[[Values, Tensor], Tensor]:
    """Returns the loss function for `optimise` of one edit that is trained on mini-batches in turn.

    The gradient is that of one mini-batch; the value is the mean over all mini-batches of the loss at their last turn,
    so that optimisation ends only when this mean is low and every mini-batch has had a turn.

    Args:
        loss: Computes the loss of each row under its edit, [rows].
        parts: The mini-batches.
    """
    last = [_UNKNOWN] * len(parts)
    turns = itertools.cycle(range(len(parts)))

    def losses(values: Values, active: Tensor) -> Tensor:
        number = next(turns)
        found = loss(parts[number], DenseEdit.of(values)).mean(0, keepdim=True)
        last[number] = found.item()
        return found + (sum(last) / len(last) - found.detach())

    return losses
