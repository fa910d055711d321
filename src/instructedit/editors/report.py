"""Whether edits reach their targets: what a method that optimises says of its own work."""

from __future__ import annotations

from typing import NamedTuple

import torch

from instructedit.data.batch import RequestBatch
from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM

_NAMED = 3  # requests that a message names


class TargetReport(NamedTuple):
    """Whether the edited model predicts each request's target, asked the request itself.

    Attributes:
        losses: Mean over the target's tokens of −log p under the edit, a number for each request.
        reached: Whether each target token is the most likely one at its place.
    """

    losses: tuple[float, ...]
    reached: tuple[bool, ...]

    def failures(self, batch: RequestBatch) -> str:
        """The requests that did not reach their target, in a line; empty if all did."""
        failed = [i for i, reached in enumerate(self.reached) if not reached]
        if not failed:
            return ""
        named = [
            f"{batch.requests[i].prompt!r} → {batch.requests[i].target!r}: loss {self.losses[i]:.2g}"
            for i in failed[:_NAMED]
        ]
        more = ", …" if len(failed) > _NAMED else ""
        return f"{len(failed)} of {len(batch)} requests did not reach their target ({', '.join(named)}{more})"


@torch.no_grad()
def target_report(lm: FrozenLM, edit: Edit, batch: RequestBatch) -> TargetReport:
    """Asks each request of its edit (one edit for all of them is asked every request).

    Args:
        lm: The unedited model.
        edit: n edits for the n requests of the batch, or one.
        batch: The requests.
    """
    tokens = batch.tokens
    scores = lm.scores.token_scores(lm.scores.states(tokens, edit), tokens.answers)
    sizes = tokens.answer_sizes()
    right = (scores.predicted == tokens.answers).split(sizes)
    losses = [part.mean().item() for part in scores.nll.split(sizes)]
    return TargetReport(tuple(losses), tuple(bool(part.all()) for part in right))


def check_finite(edit: Edit, editor: str) -> None:
    """Makes sure that an edit holds numbers.

    Raises:
        UserError: If it holds NaN or infinities.
    """
    if broken := [name for name, t in edit.state().items() if t.is_floating_point() and not t.isfinite().all()]:
        raise UserError(
            f"editor {editor!r}: the edit is not finite at {broken[0]}; try dtype float32, or a smaller rate"
        )
