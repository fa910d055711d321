"""Inputs and outputs of layers in a forward pass, and the gradients of an edit loss at these layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from instructedit.edits import Edit
from instructedit.lm import hooks
from instructedit.lm.scores import Scores
from instructedit.lm.tokens import TokenBatch
from instructedit.metrics import row_mean


@dataclass(frozen=True)
class LayerGradients:
    """Layer inputs u and output gradients δ of an edit loss at each site; together ∇W = Σ_t δ_t u_tᵀ.

    Attributes:
        u: Site → inputs of the layer, [rows, seq, in].
        delta: Site → gradient of the row's edit loss with respect to the layer's output, [rows, seq, out]; zero at
            positions that the loss does not depend on, including padding.
        loss: Edit loss of each row (mean over its target tokens of −log p), [rows].
        predicted: The unedited model's most likely token at each answer position, [positions].
    """

    u: dict[str, Tensor]
    delta: dict[str, Tensor]
    loss: Tensor
    predicted: Tensor


class LayerIO(NamedTuple):
    """Recorded `inputs` [rows, seq, in] and `outputs` [rows, seq, out] of a layer."""

    inputs: Tensor
    outputs: Tensor


@torch.no_grad()
def record_activations(
    scores: Scores, batch: TokenBatch, sites: Sequence[str], edit: Edit | None = None, rows: Tensor | None = None,
    cached: bool = True,
) -> dict[str, LayerIO]:  # fmt: skip
    """Records the inputs and outputs of layers, with edits applied; nothing above the last of them runs.

    Args:
        scores: The model's scorer.
        batch: Rows of tokens.
        sites: Names of the layers, feed-forward modules or blocks.
        edit: The edits to apply.
        rows: Which edit each row has.
        cached: Take the states of the blocks below from the prefix cache; useless for text that is read only once.
    """
    forward = scores.forward
    recorded: dict[str, LayerIO] = {}

    def keep(site: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        whole = (hooks.entering(args, kwargs), output[0] if isinstance(output, tuple | list) else output)
        inputs, outputs = (t.reshape(len(batch), -1, t.shape[-1]) for t in whole)
        last = len(recorded) + 1 == len(sites)
        recorded[site] = LayerIO(
            inputs, outputs if last else outputs.clone()
        )  # some models add to it in place afterwards
        if last:
            raise hooks.StopForward

    start = forward.resumed_from(scores.applied.sites.first_block([*sites, *(edit.sites if edit else ())]))
    hidden = scores.prefix.of(batch, start) if cached and start else None
    with scores.applied.at_layers(edit, rows), ExitStack() as stack, suppress(hooks.StopForward):
        for site in sites:  # after the edit's own hooks, whose outputs they see
            hook = functools.partial(keep, site)
            stack.callback(forward.model.get_submodule(site).register_forward_hook(hook, with_kwargs=True).remove)
        with hooks.resumed(forward.blocks, start, hidden, forward.outputs_of_a_block):
            forward.run(batch.inputs)
    return recorded


def capture(
    scores: Scores, batch: TokenBatch, sites: Sequence[str], edit: Edit | None = None, rows: Tensor | None = None
) -> LayerGradients:
    """Computes the gradient of each row's edit loss at the sites.

    Only the blocks from the first site upward run forward and backward, and no weight gets a gradient.

    Args:
        scores: The model's scorer.
        batch: One edit request per row.
        sites: Names of the layers.
        edit: The edits to apply.
        rows: Which edit each row has.
    """
    forward = scores.forward
    u: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(site: str, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        u[site], outputs[site] = hooks.entering(args, kwargs).detach(), output

    def apart(flat: Tensor) -> Tensor:
        return flat.reshape(len(batch), -1, flat.shape[-1])  # some MLPs flatten all rows into one

    start = forward.resumed_from(scores.applied.sites.first_block([*sites, *(edit.sites if edit else ())]))
    # Cloned, since cached states may have been computed in inference mode.
    hidden = scores.prefix.of(batch, start).clone().requires_grad_()
    with torch.enable_grad(), forward.no_autocast(), scores.applied.at_layers(edit, rows), ExitStack() as stack:
        for site in sites:
            hook = functools.partial(keep, site)
            stack.callback(forward.model.get_submodule(site).register_forward_hook(hook, with_kwargs=True).remove)
        nll, predicted = scores.token_scores(
            forward.from_block(batch.inputs, start, hidden)[batch.answer_at], batch.answers
        )
        loss = row_mean(nll, batch.rows, len(batch))
        grads = torch.autograd.grad(loss.sum(), [outputs[s] for s in sites])
    delta = {site: apart(grad) for site, grad in zip(sites, grads, strict=True)}
    return LayerGradients({site: apart(u[site]) for site in sites}, delta, loss.detach(), predicted)
