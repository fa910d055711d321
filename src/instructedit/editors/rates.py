"""Measures the edit rate that suits a model, by a sweep of the untrained editor's rate on a few training records.

The rate that suits one model is off by a factor of ten for another, and training does not recover from one that is too
high.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from instructedit.data.batch import EditBatch
from instructedit.editors.losses import LossWeights, editing_loss
from instructedit.editors.mend import Mend
from instructedit.editors.normalizer import RunningNorm
from instructedit.edits import Factors, LowRankEdit

#: Exponents of ten that are tried, in ascending order.
_COARSE = range(-7, 1)
#: Distances from the best rate so far, in exponents of ten, at which both sides are then tried.
_FINE = (1 / 2, 1 / 4, 1 / 8)
#: The sweep ends when the loss exceeds both this multiple of the lowest one and that of the unedited model.
_TURNED = 1.5


class RateLoss(NamedTuple):
    """The outer loss of the untrained editor at one rate; rate 0 is the unedited model."""

    rate: float
    loss: float
    edit_loss: float
    locality_loss: float


def sweep_rates(editor: Mend, batch: EditBatch, weights: LossWeights) -> list[RateLoss]:
    """Computes the outer loss c_edit · L_e + c_loc · KL of an untrained editor for a sweep of edit rates.

    Such an editor is the identity on normalised u and δ. Its edit is computed once; for each rate only the part of the
    model from the first edited block on runs, with the same factors rescaled. Nothing in the editor changes, including
    its running statistics: here u and δ are normalised by the statistics of the batch alone.

    Args:
        editor: An untrained editor.
        batch: Some training records.
        weights: Weights of the run's outer loss.

    Returns:
        All rates that were tried, ascending; the first is 0, the unedited model. Losses that overflow are infinite.
    """
    with torch.no_grad():
        with _own_statistics(editor):
            edit = editor.compute_edit(batch.requests)
        rate_made = editor.alpha[0].item()

        def at(rate: float) -> RateLoss:
            edit_loss, locality = editing_loss(editor.lm, _scaled(edit, rate / rate_made), batch, weights.unlikelihood)
            loss = (weights.edit * edit_loss + weights.locality * locality).item()
            return RateLoss(rate, loss if math.isfinite(loss) else math.inf, edit_loss.item(), locality.item())

        tried = [at(0.0)]
        for exponent in _COARSE:
            tried.append(at(10.0**exponent))
            least = min(found.loss for found in tried)
            if tried[-1].loss > max(_TURNED * least, tried[0].loss):
                break
        for step in _FINE:
            best = best_rate(tried)
            tried += [at(best / 10**step), at(best * 10**step)]
    return sorted(tried)


def best_rate(tried: list[RateLoss]) -> float:
    """Returns the rate with the lowest loss, among those above zero."""
    return min(tried[1:], key=lambda found: found.loss).rate


@contextmanager
def _own_statistics(editor: Mend) -> Iterator[None]:
    """Starts empty running statistics in training mode for the context, and restores the old ones afterwards."""
    norms = [module for module in editor.modules() if isinstance(module, RunningNorm)]
    states = [{name: tensor.clone() for name, tensor in norm.state_dict().items()} for norm in norms]
    was_training = editor.training
    try:
        for norm in norms:
            norm.reset()
        editor.train()
        yield
    finally:
        editor.train(was_training)
        for norm, state in zip(norms, states, strict=True):
            norm.load_state_dict(state)


def _scaled(edit: LowRankEdit, factor: float) -> LowRankEdit:
    return LowRankEdit({site: Factors(a, factor * b) for site, (a, b) in edit.factors.items()})
