"""Gradient descent for many requests at once, each with its own values, loss and stopping point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from instructedit.edits import Edit
from instructedit.errors import UserError, at_least
from instructedit.lm import TokenBatch

Values = dict[str, Tensor]


def _adam(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def _adafactor(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # An absolute rate, as in CaliNet's training; by default the rate would scale with the size of the parameter.
    options: dict[str, Any] = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(groups, weight_decay=weight_decay, **options)


#: Name → function that makes an optimiser from (parameter groups, each with its learning rate; weight decay).
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adafactor": _adafactor,
}


def row_losses(
    loss: Callable[[TokenBatch, Edit], Tensor], tokens: TokenBatch, edit: Callable[[Values], Edit], together: bool
) -> Callable[[Values, Tensor], Tensor]:
    """Returns the loss function for `optimise` of requests that are rows of tokens.

    Args:
        loss: Computes the loss of each row under its edit, [rows].
        tokens: Row i is request i.
        edit: Makes edits from values, name → [n, …].
        together: Use one edit for all rows and their mean loss, instead of an edit and a loss for each.
    """

    def losses(values: Values, active: Tensor) -> Tensor:
        if together:
            return loss(tokens, edit(values)).mean(0, keepdim=True)
        return loss(tokens.select(active), edit(values))

    return losses


def optimise(
    start: Mapping[str, Tensor],
    losses: Callable[[Values, Tensor], Tensor],
    steps: int,
    lr: float | Mapping[str, float],
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    stop_below: float = 0.0,
    project: Callable[[Values, int], None] | None = None,
) -> Values:
    """Minimises a loss for each of n requests by gradient descent.

    Requests are independent: each has its own tensors and optimiser state, and drops out when its loss is low enough,
    so that n requests at once give the same results as each one alone.

    Args:
        start: Name → initial values of all requests, [n, …].
        losses: Computes the loss of each unfinished request, [active], from their values, name → [active, …], and the
            indices of these requests, [active].
        steps: Largest number of steps of a request.
        lr: Learning rate: one for all values, or a mapping from the names of values to their rates.
        optimizer: One of `OPTIMIZERS`.
        weight_decay: Decoupled weight decay of all values.
        stop_below: A request with a loss below this is finished.
        project: Projects the values of one request, name → […], onto the allowed region, in place; called after each
            of its steps.

    Returns:
        Name → final values, [n, …].

    Raises:
        UserError: If there is no such optimiser, a rate is negative, or a loss is not finite.
    """
    if optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}; there are: {', '.join(OPTIMIZERS)}")
    own = [
        {name: value.detach().clone().requires_grad_() for name, value in zip(start, row, strict=True)}
        for row in zip(*start.values(), strict=True)
    ]
    active = list(range(len(own)))
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(start, lr)
    at_least(0, lr=min(rates.values()))
    groups = [{"params": [values[name] for values in own], "lr": rates[name]} for name in start]
    method = OPTIMIZERS[optimizer](groups, weight_decay)
    device = next(iter(start.values())).device
    for _ in range(steps):
        with torch.enable_grad():
            stacked = {name: torch.stack([own[i][name] for i in active]) for name in start}
            loss = losses(stacked, torch.tensor(active, device=device))
            found = loss.tolist()
            if not torch.isfinite(loss).all():
                bad = active[[value - value == 0 for value in found].index(False)]
                raise UserError(f"request {bad}: the loss is {loss.tolist()[active.index(bad)]}; try a smaller lr")
            going = [k for k, value in enumerate(found) if value >= stop_below]
            if not going:
                break
            loss[going].sum().backward()
        # Values without a gradient, which belong to finished requests, are not changed by the optimiser.
        active = [active[k] for k in going]
        done = [value for i, values in enumerate(own) if i not in set(active) for value in values.values()]
        for value in done:
            value.grad = None
        method.step()
        method.zero_grad(set_to_none=True)
        if project:
            with torch.no_grad():
                for i in active:
                    project(own[i], i)
    for i, values in enumerate(own):
        if not all(value.isfinite().all() for value in values.values()):
            raise UserError(f"request {i}: its values are no longer finite; try a smaller lr")
    return {name: torch.stack([values[name].detach() for values in own]) for name in start}
