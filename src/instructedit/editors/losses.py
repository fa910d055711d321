"""The outer loss of a trainable editor: what the edited model should say, and what it should leave alone."""

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

_FEWEST = 1e-9  # requests with locality probes: where no process has any, the loss is 0 / this


class LossWeights(NamedTuple):
    """Weights of the outer loss: of the edit, of locality, and within the edit of the unlikelihood of unwanted replies.

    MEND's are 0.1 and 1, SERAC's for unlikelihood 1.
    """

    edit: float = 0.1
    locality: float = 1.0
    unlikelihood: float = 1.0


class EditingLoss(NamedTuple):
    """Mean losses over the requests of a batch, scalars.

    Of several processes each has its own; their mean is the loss of all their requests as one batch.

    Attributes:
        edit: L_e of the in-scope probes under the edited model; with unwanted replies SERAC's, where their
            unlikelihood is added.
        locality: KL(unedited ‖ edited) at the answer positions of the out-of-scope probes, the position that predicts
            the first answer token included.
    """

    edit: Tensor
    locality: Tensor


def editing_loss(lm: FrozenLM, edit: Edit, batch: EditBatch, unlikelihood: float = 1.0) -> EditingLoss:
    """Both terms of MEND's outer loss, each request under its own edit.

    Args:
        lm: The unedited model.
        edit: One edit for each request of the batch, with gradients.
        batch: Requests and probes.
        unlikelihood: Weight of the unwanted replies beside the wanted ones (SERAC: 1).
    """
    edit_loss = scope_loss(lm, edit, batch.in_scope, len(batch), weight=unlikelihood)
    return EditingLoss(edit_loss, locality_loss(lm, edit, batch.locality, len(batch)))


def scope_loss(lm: FrozenLM, edit: Edit, probes: ProbeBatch, requests: int, *, weight: float = 1.0) -> Tensor:
    """Mean over requests of: mean NLL of the wanted answers + mean unlikelihood −log(1 − p) of the unwanted ones."""
    tokens = probes.tokens
    unwanted_at = probes.unwanted[tokens.places[0]]

    def read(logits: Tensor, at: slice) -> tuple[Tensor]:
        return (answer_losses(logits, tokens.answers[at], unwanted_at[at]),)

    (terms,) = lm.scores.chunked_logits(lm.scores.states(tokens, edit, probes.request_index), read)
    per_row = row_mean(terms, tokens.rows, len(tokens))
    unwanted = probes.unwanted.to(per_row.device)
    wanted_part, unwanted_part = (
        _per_request(per_row, probes.request_index, s, requests)[0] for s in (~unwanted, unwanted)
    )
    return (wanted_part + weight * unwanted_part).mean()


def locality_loss(lm: FrozenLM, edit: Edit, probes: ProbeBatch | None, requests: int) -> Tensor:
    """Mean over the requests that have such probes of KL(unedited ‖ edited) per answer position, in nats.

    Several processes divide by how many such requests each has on average: the mean of their gradients is then that of
    one batch, however unevenly the probes fall.
    """
    total, count = _divergences(lm, edit, probes, requests)
    return total / mean_over_processes(count).clamp(min=_FEWEST)


def _divergences(lm: FrozenLM, edit: Edit, probes: ProbeBatch | None, requests: int) -> tuple[Tensor, Tensor]:
    """Sum of the divergences of the requests that have locality probes, and the number of these requests."""
    if probes is None:
        none = in_full(torch.zeros((), dtype=lm.model.dtype, device=lm.device))  # as another process has it
        return none, none
    tokens = probes.tokens
    before = lm.scores.unedited_states(tokens, lm.first_block(edit.sites))

    def read(logits: Tensor, at: slice) -> tuple[Tensor]:
        return (divergences(logits, lm.forward.head(before[at])),)

    (divergence,) = lm.scores.chunked_logits(lm.scores.states(tokens, edit, probes.request_index), read)
    per_row = row_mean(divergence, tokens.rows, len(tokens))
    means, counts = _per_request(per_row, probes.request_index, torch.ones_like(probes.request_index), requests)
    return means.sum(), (counts > 0).sum().to(means.dtype)


def _per_request(values: Tensor, request_index: Tensor, chosen: Tensor, requests: int) -> tuple[Tensor, Tensor]:
    """Mean of the chosen rows of each request, 0 for a request without any, and their number, both [requests]."""
    weight = chosen.to(values.dtype)
    total = values.new_zeros(requests).index_add(0, request_index, values * weight)
    count = values.new_zeros(requests).index_add(0, request_index, weight)
    return total / count.clamp(min=1), count
