"""Ridge regression from keys to values with a prior over keys, ΔW = V (I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class PriorKeys:
    """A solver with C = λ₀ E[u uᵀ] + λ₁ I, in the eigenbasis of E[u uᵀ], so that gradients reach the λ.

    Keys are measured in units of the root mean square of their coordinates over plain text.

    Args:
        covariance: E[u uᵀ] of the site's inputs over plain text, [in, in].
    """

    def __init__(self, covariance: Tensor) -> None:
        covariance = covariance.double()
        self.unit = covariance.diagonal().mean().sqrt().item()
        values, basis = torch.linalg.eigh(covariance / self.unit**2)
        self.values, self.basis = values.clamp(min=0).float(), basis.float()

    def solve(self, keys: Tensor, log_weights: Tensor) -> Tensor:
        """Computes C⁻¹ K for each request's keys K.

        Args:
            keys: The site's inputs in its `unit`, [n, tokens, in].
            log_weights: Logarithms of λ₀ and λ₁, [2].
        """
        prior, identity = log_weights.exp()
        return (keys @ self.basis / (prior * self.values + identity)) @ self.basis.T


@dataclass(frozen=True)
class PastKeys:
    """C⁻¹ of one site, [in, in], in a sequence of edits, each of which adds Σ u uᵀ of its keys to C."""

    inverse: Tensor

    def and_these(self, keys: Tensor) -> PastKeys:
        """Adds keys [tokens, in], in the site's unit: C⁻¹ − C⁻¹ K (I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹ (Woodbury)."""
        solved = keys @ self.inverse
        return PastKeys(self.inverse - solved.T @ ridge(keys, solved, solved))


def ridge(keys: Tensor, solved: Tensor, values: Tensor) -> Tensor:
    """Computes V (I + Kᵀ C⁻¹ K)⁻¹, the left factor of the ridge solution ΔW = V (I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹.

    That ΔW minimises Σ_t ‖ΔW k_t − v_t‖² + tr(ΔW C ΔWᵀ) (see the tests); rows of zeros remain zero.

    Args:
        keys: K of each request, [n, tokens, in].
        solved: C⁻¹ K, [n, tokens, in].
        values: V, [n, tokens, out].
    """
    gram = keys @ solved.mT
    system = gram + torch.eye(gram.shape[-1], device=gram.device)
    return torch.linalg.solve(system.mT, values)
