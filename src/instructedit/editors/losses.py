"""The outer loss of a trainable editor: an edit term for what should change, a locality term for what should not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from instructedit.data.batch import EditBatch, ProbeBatch
from instructedit.edits import Edit
from instructedit.lm import FrozenLM
from instructedit.lm.position_losses import answer_losses, divergences
from instructedit.metrics import row_mean
from instructedit.processes import mean_over_processes
from instructedit.rows import in_full

_FEWEST = 1e-9  # lower limit of the requests with locality probes: if no process has any, the loss is 0 / this


class LossWeights(NamedTuple):
    """Weights in the outer loss of the edit term, the locality term, and the unlikelihood of unwanted replies.

    The last is relative to the rest of the edit term. MEND has 0.1 and 1; SERAC's weight for unlikelihood is 1.
    """

    edit: float = 0.1
    locality: float = 1.0
    unlikelihood: float = 1.0


class EditingLoss(NamedTuple):
    """Mean losses over the requests of a batch, scalars.

    Each of several processes has its own; their mean is the loss of all their requests as one batch.

    Attributes:
        edit: L_e of the in-scope probes under the edited model; with unwanted replies, their unlikelihood is added as
            in SERAC.
        locality: KL(unedited ‖ edited) at the answer positions of the out-of-scope probes, including the position that
            predicts the first answer token.
    """

    edit: Tensor
    locality: Tensor


def editing_loss(lm: FrozenLM, edit: Edit, batch: EditBatch, unlikelihood: float = 1.0) -> EditingLoss:
    """Computes both terms of MEND's outer loss, each request under its own edit.

    Args:
        lm: The unedited model.
        edit: One edit for each request of the batch, with gradients.
        batch: Requests and probes.
        unlikelihood: Weight of the unwanted replies relative to the wanted ones (SERAC: 1).
    """
    edit_loss = scope_loss(lm, edit, batch.in_scope, len(batch), weight=unlikelihood)
    return EditingLoss(edit_loss, locality_loss(lm, edit, batch.locality, len(batch)))


def scope_loss(lm: FrozenLM, edit: Edit, probes: ProbeBatch, requests: int, *, weight: float = 1.0) -> Tensor:
    """Averages over requests: mean NLL of wanted answers + weight · mean unlikelihood −log(1 − p) of unwanted ones."""
    tokens = probes.tokens
    unwanted_at = probes.unwanted[tokens.places[0]]

    def losses(logits: Tensor, at: slice) -> tuple[Tensor]:
        return (answer_losses(logits, tokens.answers[at], unwanted_at[at]),)

    (terms,) = lm.scores.chunked_logits(lm.scores.states(tokens, edit, probes.request_index), losses)
    per_row = row_mean(terms, tokens.rows, len(tokens))
    unwanted = probes.unwanted.to(per_row.device)
    wanted_part, unwanted_part = (
        _per_request(per_row, probes.request_index, s, requests)[0] for s in (~unwanted, unwanted)
    )
    return (wanted_part + weight * unwanted_part).mean()


def locality_loss(lm: FrozenLM, edit: Edit, probes: ProbeBatch | None, requests: int) -> Tensor:
    """Averages KL(unedited ‖ edited) per answer position over the requests that have locality probes, in nats.

    Several processes divide by the average number of such requests per process: the mean of their gradients then
    equals that of one batch, however unevenly the probes are distributed.
    """
    total, count = _divergences(lm, edit, probes, requests)
    return total / mean_over_processes(count).clamp(min=_FEWEST)


def _divergences(lm: FrozenLM, edit: Edit, probes: ProbeBatch | None, requests: int) -> tuple[Tensor, Tensor]:
    """Sums the divergences of the requests that have locality probes, and counts these requests."""
    if probes is None:
        none = in_full(torch.zeros((), dtype=lm.model.dtype, device=lm.device))  # with the dtype of other processes
        return none, none
    tokens = probes.tokens
    before = lm.scores.unedited_states(tokens, lm.first_block(edit.sites))

    def drift(logits: Tensor, at: slice) -> tuple[Tensor]:
        return (divergences(logits, lm.forward.head(before[at])),)

    (divergence,) = lm.scores.chunked_logits(lm.scores.states(tokens, edit, probes.request_index), drift)
    per_row = row_mean(divergence, tokens.rows, len(tokens))
    means, counts = _per_request(per_row, probes.request_index, torch.ones_like(probes.request_index), requests)
    return means.sum(), (counts > 0).sum().to(means.dtype)


def _per_request(values: Tensor, request_index: Tensor, chosen: Tensor, requests: int) -> tuple[Tensor, Tensor]:
    """Returns each request's mean over its chosen rows (0 if it has none) and their number, both [requests]."""
    weight = chosen.to(values.dtype)
    total = values.new_zeros(requests).index_add(0, request_index, values * weight)
    count = values.new_zeros(requests).index_add(0, request_index, weight)
    return total / count.clamp(min=1), count
