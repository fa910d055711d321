"""Scores of answer tokens by a frozen model: chunked logits, losses and predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm.chunked_logits import parts, positionwise
from instructedit.lm.context import ContextStates
from instructedit.lm.position_losses import answer_losses
from instructedit.lm.tokens import TokenBatch
from instructedit.metrics import row_mean
from instructedit.rows import take_rows

#: Logits in memory at once: the minimum number of positions, and the bytes of float32 logits within which more fit.
HEAD = {"cpu": (128, 8 << 20), "gpu": (512, 256 << 20)}


class TokenScores(NamedTuple):
    """Scores at answer positions: −log p of the answer's token, and the predicted (likeliest) one, both [positions]."""

    nll: Tensor
    predicted: Tensor


class Scores:
    """Scores answer tokens, with the logits of all positions never in memory at once."""

    def __init__(self, context: ContextStates, name: str) -> None:
        self.context, self.name = context, name
        self.prefix, self.applied, self.forward = context.prefix, context.applied, context.forward

    @torch.no_grad()
    def unedited_states(self, batch: TokenBatch, start: int = 0) -> Tensor:
        """Computes the last block's outputs at the answer positions without any edit, [positions, hidden].

        They are kept in the prefix cache: a repeated prompt runs no block.

        Args:
            batch: Rows of tokens.
            start: Blocks below this one come from the prefix cache the first time too.

        Raises:
            UserError: While an edit is applied.
        """
        self._refuse_applied("states")
        top = len(self.forward.blocks)
        return self.prefix.cache.states(batch, top, functools.partial(self._leaving, start=start))[batch.answer_at]

    def unedited_predictions(self, batch: TokenBatch, start: int = 0) -> TokenScores:
        """Predicts and scores answer tokens as `predictions` does, without an edit; repeated rows cost nothing.

        Arguments and errors as for `unedited_states`.
        """
        self._refuse_applied("predictions")
        pairs = zip(batch.input_ids.numpy(), batch.labels.numpy(), batch.lengths, strict=True)
        keys = [(ids[:size].tobytes(), labels[:size].tobytes()) for ids, labels, size in pairs]

        def compute(rows: list[int]) -> list[tuple[Tensor, ...]]:
            part = batch.select(torch.tensor(rows))
            columns = [column.split(part.answer_sizes()) for column in self.predictions(part, start=start)]
            return list(zip(*columns, strict=True))

        return TokenScores(*map(torch.cat, zip(*self.prefix.cache.memoized("predictions", keys, compute), strict=True)))

    def _refuse_applied(self, what: str) -> None:
        """Raises an error while an edit is applied: what it changed would be kept as the unedited model's."""
        if self.applied:
            raise UserError(f"an edit is applied to the model: ask for its unedited {what} outside of `edited`")

    def _leaving(self, batch: TokenBatch, start: int) -> Tensor:
        start = self.forward.resumed_from(start)
        states: list[Tensor] = [torch.empty(0)] * len(batch)
        for rows, part in batch.in_shapes(self.forward.max_length, self.prefix.pass_tokens):
            hidden = self.prefix.of(part, start) if start else None
            for i, own in zip(rows, self.forward.from_block(part.inputs, start, hidden), strict=True):
                states[i] = own[: batch.lengths[i]]
        return batch.padded(states)

    def chunked_logits(self, states: Tensor, what: Callable[[Tensor, slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Computes a function of the logits in chunks, so that they are never in memory all at once.

        Args:
            states: States that left the last block, [positions, hidden].
            what: Takes logits [n, vocab] and the slice of their positions among all; returns one number for each
                position, [n], differentiable with respect to the logits of that position, and optionally more tensors,
                [n, …], which are not.

        Returns:
            The results for all positions.
        """
        return positionwise(states, lambda part, at: what(self.forward.head(part), at), self._head_positions)

    @functools.cached_property
    def _head_positions(self) -> int:
        """Number of positions whose logits are in memory at once.

        It is large enough that the head's product is bound by arithmetic rather than by reading its matrix, whose size
        does not matter for that: a small vocabulary merely leaves room for more.
        """
        few, budget = HEAD["cpu" if self.forward.device.type == "cpu" else "gpu"]
        return max(few, budget // (4 * self.forward.model.config.get_text_config().vocab_size))

    def token_scores(self, states: Tensor, answers: Tensor) -> TokenScores:
        """Scores answer tokens, [positions], by states that left the last block, [positions, hidden]."""

        def score(logits: Tensor, at: slice) -> tuple[Tensor, ...]:
            return answer_losses(logits, answers[at]), logits.detach().argmax(-1)

        return _checked(self.name, TokenScores(*self.chunked_logits(states, score)))

    @torch.no_grad()
    def predictions(
        self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int | None = None
    ) -> TokenScores:
        """Predicts the answers' tokens and scores them, without gradients (arguments as for `states`).

        Logits of a position that several rows share are computed once.
        """
        batch = batch if self.applied.layers else batch.read_part()
        states, node = self.context.shared(batch, edit, rows, start)
        answers, order = batch.answers, node.argsort()
        ends = node[order]
        nll, predicted = torch.empty(len(node), device=node.device), torch.empty_like(node)
        for at in parts(len(states), self._head_positions):
            logits = self.forward.head(states[at]).float()
            mine = order[torch.searchsorted(ends, at.start) : torch.searchsorted(ends, at.stop)]
            here = node[mine] - at.start
            nll[mine] = logits.logsumexp(-1)[here] - logits[here, answers[mine]]
            predicted[mine] = logits.argmax(-1)[here]
        return _checked(self.name, TokenScores(nll, predicted))

    def states(
        self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int | None = None
    ) -> Tensor:
        """Computes the last block's outputs at the answer positions; `Forward.head` turns them into logits.

        Args:
            batch: Rows of tokens.
            edit: The edits to apply; None is the unedited model.
            rows: Which edit each row has, [rows]; by default row i has edit i, or all the only one.
            start: Blocks below this one come from the prefix cache; by default those below the edit, if there is one.

        Returns:
            [positions, hidden], in the order of ``batch.answers``.
        """
        states, node = self.context.shared(batch, edit, rows, start)
        return states if len(states) == len(node) and bool((node.diff() > 0).all()) else take_rows(states, node)

    def losses(
        self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int | None = None
    ) -> Tensor:
        """Computes each row's edit loss: mean −log p of its answer's tokens, [rows] (arguments as for `states`)."""
        nll = self.token_scores(self.states(batch, edit, rows, start), batch.answers).nll
        return row_mean(nll, batch.rows, len(batch))


def _checked(name: str, scores: TokenScores) -> TokenScores:
    """Returns the scores after checking that none is NaN.

    Raises:
        UserError: If one is NaN.
    """
    if scores.nll.isnan().any():
        raise UserError(f"{name}: its logits are not numbers (NaN), which is no score; try dtype float32")
    return scores
