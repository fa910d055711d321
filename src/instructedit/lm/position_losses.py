"""Losses of logits, one for each position, with gradients that are written by hand rather than traced by autograd.

A large vocabulary makes logits the largest tensor of a pass, and autograd would keep a float32 copy for every step of a
loss. Here a few rows at a time, which fit in a CPU's cache, are converted to float32, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instructedit.lm.chunked_logits import parts
from instructedit.rows import in_full

#: Logits in a block of rows on a CPU; a GPU takes all rows at once.
BLOCK = 1 << 19


def answer_losses(logits: Tensor, answers: Tensor, unwanted: Tensor | None = None) -> Tensor:
    """Computes −log p of each answer token, or −log(1 − p) where that token is unwanted.

    The loss is finite, with the right gradient, even where p rounds to 1.

    Args:
        logits: [positions, vocab].
        answers: Token ids, [positions].
        unwanted: True where the model should predict another token, [positions], on the host; by default nowhere.

    Returns:
        [positions], in float32 or float64.
    """
    nowhere = torch.zeros(len(logits), dtype=torch.bool)
    found: Tensor = _AnswerLosses.apply(logits, answers, nowhere if unwanted is None else unwanted)
    return found


def divergences(logits: Tensor, expected: Tensor) -> Tensor:
    """Computes KL(expected ‖ found) at each position, in nats; `logits` are those found.

    Args:
        logits: [positions, vocab].
        expected: Logits of the reference distribution, which get no gradient, [positions, vocab].

    Returns:
        [positions], in float32 or float64.
    """
    found: Tensor = _Divergences.apply(logits, expected)
    return found


class _AnswerLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, answers: Tensor, unwanted: Tensor) -> Tensor:
        found = []
        for at in _blocks(logits):
            logs, own, rows = _prepared(logits[at], answers[at], unwanted[at])
            others = logs[rows].scatter_(-1, own[rows], -torch.inf)
            found.append(-logs.gather(-1, own).squeeze(-1).index_copy(0, rows, others.logsumexp(-1)))
        ctx.save_for_backward(logits, answers, unwanted)
        return torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, answers, unwanted = ctx.saved_tensors
        slopes = torch.empty_like(logits)
        for at in _blocks(logits):
            logs, own, rows = _prepared(logits[at], answers[at], unwanted[at])
            others = logs[rows].scatter_(-1, own[rows], -torch.inf).softmax(-1)
            less = grad.new_full(own.shape, -1.0).index_fill_(0, rows, 0.0)
            p = logs.exp_().scatter_add_(-1, own, less).index_add_(0, rows, others, alpha=-1)
            slopes[at] = p.mul_(grad[at, None])
        return slopes, None, None


def _prepared(logits: Tensor, answers: Tensor, unwanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities, answers as a column, and indices of unwanted rows, without a device sync."""
    return in_full(logits).log_softmax(-1), answers[:, None], unwanted.nonzero().squeeze(-1).to(logits.device)


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor) -> Tensor:
        found = []
        for at in _blocks(logits):
            before, after = (
                in_full(part[at]).log_softmax(-1).clamp_(min=torch.finfo(torch.float32).min)  # 0 · (∞ − ∞) is NaN
                for part in (expected, logits)
            )
            found.append(before.exp().mul_(before.sub_(after)).sum(-1))
        ctx.save_for_backward(logits, expected)
        return torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, expected = ctx.saved_tensors
        slopes = torch.empty_like(logits)
        for at in _blocks(logits):
            after, before = in_full(logits[at]).softmax(-1), in_full(expected[at]).softmax(-1)
            slopes[at] = after.sub_(before).mul_(grad[at, None])
        return slopes, None


def _blocks(logits: Tensor) -> list[slice]:
    rows, width = logits.shape
    return parts(rows, max(1, BLOCK // width if logits.device.type == "cpu" else rows))
