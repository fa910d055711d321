"""Running normalisation of a hypernetwork's inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instructedit.processes import sum_over_processes

#: Number of tokens that are converted to double precision at once.
_AT_ONCE = 1024


class RunningNorm(nn.Module):
    """Standardises each coordinate by a running mean and deviation over tokens.

    Statistics are updated in training (before use, as in MEND) and frozen in evaluation; before any token the module is
    the identity. Batches, and those of several processes, are merged exactly (Chan et al. 1979), as if all tokens had
    come at once.

    Args:
        size: Number of coordinates.
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
        """Standardises x, [tokens, size]; in training x is first added to the statistics."""
        if self.training:
            self.update(x)
        return self.standardised(x)

    def standardised(self, x: Tensor) -> Tensor:
        """Standardises x, [tokens, size], by the statistics so far."""
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt().to(x.dtype)
        known = (self.count > 1) & (deviation > 0)
        return (x - self.mean).div_(torch.where(known, deviation + self.eps, torch.ones_like(deviation)))

    def reset(self) -> None:
        """Resets the statistics to those of no tokens."""
        for buffer in (self.count, self.mean, self.squares):
            buffer.zero_()

    @torch.no_grad()
    def update(self, x: Tensor, everywhere: bool = True) -> None:
        """Adds tokens to the statistics.

        Args:
            x: [tokens, size].
            everywhere: Under data parallelism, add the tokens of every process; otherwise only this one's.
        """
        count = torch.full((), len(x), dtype=torch.float64, device=x.device)
        total = x.sum(0).double()
        if everywhere:
            both = sum_over_processes(torch.cat([count[None], total]))
            count, total = both[0], both[1:]
        mean = total / count.clamp(min=1)  # clamped, so that no tokens change nothing without a branch
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
