"""Reports on whether edits reach their targets, for methods that find edits by optimisation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from instructedit.data.batch import RequestBatch
from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM

_NAMED = 3  # most requests that a message names


class TargetReport(NamedTuple):
    """The success of each request: its loss, and whether the edited model predicts its target for its own prompt.

    Attributes:
        losses: Mean over the target's tokens of −log p under the edit, one number for each request.
        reached: For each request, whether every target token is the most likely one at its position.
    """

    losses: tuple[float, ...]
    reached: tuple[bool, ...]

    def failures(self, batch: RequestBatch) -> str:
        """Describes the requests that did not reach their target, in one line; empty if all did."""
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
    """Reports on each request's target under its own edit, or under the only edit.

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
    """Checks that an edit contains only finite numbers.

    Raises:
        UserError: If it contains NaN or infinities.
    """
    if broken := [name for name, t in edit.state().items() if t.is_floating_point() and not t.isfinite().all()]:
        raise UserError(
            f"editor {editor!r}: the edit is not finite at {broken[0]}; try dtype float32, or a smaller rate"
        )
