"""Running normalisation of what a hypernetwork reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instructedit.processes import sum_over_processes

#: Tokens that are there in double precision at once.
_AT_ONCE = 1024


class RunningNorm(nn.Module):
    """Standardises each coordinate by a running mean and deviation over tokens.

    Estimated in training (before use, as in MEND), frozen in evaluation, the identity before any token. Batches, and
    the batches of several processes, are merged exactly (Chan et al. 1979): the result is that of all tokens at once.

    Args:
        size: Coordinates.
        eps: Added to the deviation.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, size: int, eps: float = 1e-7) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("squares", torch.zeros(size))  # Σ (x − mean)²

    def forward(self, x: Tensor) -> Tensor:
        """Standardised x, [tokens, size]."""
        if self.training:
            self.update(x)
        return self.standardised(x)

    def standardised(self, x: Tensor) -> Tensor:
        """Standardised x, [tokens, size], by what has been seen so far."""
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt().to(x.dtype)
        known = (self.count > 1) & (deviation > 0)
        return (x - self.mean).div_(torch.where(known, deviation + self.eps, torch.ones_like(deviation)))

    def reset(self) -> None:
        """Forgets all tokens."""
        for buffer in (self.count, self.mean, self.squares):
            buffer.zero_()

    @torch.no_grad()
    def update(self, x: Tensor, everywhere: bool = True) -> None:
        """Adds tokens.

        Args:
            x: [tokens, size].
            everywhere: Under data parallelism those of every process; else this one's alone.
        """
        count = torch.full((), len(x), dtype=torch.float64, device=x.device)
        total = x.sum(0).double()
        if everywhere:
            both = sum_over_processes(torch.cat([count[None], total]))
            count, total = both[0], both[1:]
        mean = total / count.clamp(min=1)  # no token at all changes nothing, without a look at how many there are
        squares = torch.zeros_like(total)
        for part in x.split(_AT_ONCE):
            squares += (part.double() - mean).square_().sum(0)
        if everywhere:
            squares = sum_over_processes(squares)
        shift = mean - self.mean
        both_counts = self.count + count
        share = count / both_counts.clamp(min=1)
        self.squares += (squares + shift.square() * self.count * share).to(self.squares.dtype)
        self.mean += (shift * share).to(self.mean.dtype)
        self.count.copy_(both_counts)
