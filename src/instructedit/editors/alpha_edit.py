"""AlphaEdit: MEMIT's update, projected onto the null space of the knowledge to preserve (Fang et al. 2025)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from instructedit.data.batch import RequestBatch
from instructedit.editors.memit import SpreadEditor
from instructedit.editors.options import AUTO, options
from instructedit.edits import LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import Site
from instructedit.lm.covariance import covariances


class NullSpace:
    """The directions that plain text hardly uses in a layer's input space, with the projection P = U Uᵀ onto them.

    The columns of U are the eigenvectors of E[u uᵀ] with the smallest eigenvalues, as many as together hold at most a
    given share of E‖u‖².

    Args:
        covariance: E[u uᵀ] of the layer's inputs over plain text, [in, in].
        energy: The share of E‖u‖².
    """

    def __init__(self, covariance: Tensor, energy: float) -> None:
        values, vectors = torch.linalg.eigh(covariance.double())
        values = values.clamp(min=0)
        reached = values.cumsum(0)  # its own last entry, as a separate sum may round lower: a share of 1 keeps all
        size = int((reached <= energy * reached[-1]).sum())
        self.basis = vectors[:, :size]
        #: E‖P u‖², what plain text has in these directions.
        self.left = values[:size].sum().item()

    def coordinates(self, keys: Tensor) -> Tensor:
        """Computes Uᵀ k for each key, [n, size] in double precision."""
        return keys.double() @ self.basis

    def solve(self, coordinates: Tensor, l2: float, kept: Tensor | None) -> Tensor:
        """Computes U (L2·I + Uᵀ K_p K_pᵀ U)⁻¹ Uᵀ k for each key, [n, in].

        Args:
            coordinates: Uᵀ k, [n, size].
            l2: L2.
            kept: Uᵀ K_p K_pᵀ U of earlier edits' keys K_p, [size, size]; None if there are none.
        """
        if kept is None:
            return coordinates @ self.basis.T / l2
        weights = kept + l2 * torch.eye(len(kept)).to(kept)
        return torch.cholesky_solve(coordinates.T, torch.linalg.cholesky(weights)).T @ self.basis.T


@options
class AlphaEdit(SpreadEditor):
    """MEMIT restricted to the null space of plain text: ΔW = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L2·I)⁻¹ in several blocks.

    P projects onto the null space of the layer's inputs over plain text (Fang et al. 2025, equation 14 with L2 from
    their code), K_p are the keys of earlier edits in a sequence, and values and residuals R are MEMIT's. Since
    P is symmetric and P² = P, this is MEMIT's solution with M⁻¹ = U (L2·I + Uᵀ K_p K_pᵀ U)⁻¹ Uᵀ and P = U Uᵀ.

    The paper cuts eigenvalues at 2e-2 and sets L2 = 10, numbers that only fit the scale of its models' layers. Here
    the null space is given by its share of E‖u‖², which says how much of plain text an edit may touch in any units,
    and L2 by the size of a plain-text token in that space, E‖P u‖²: a key that stands out from plain text is written
    in full, one that does not is written by half.

    Defaults: blocks 13 to 17 of GPT2-XL's 48, values by 20 steps of Adam at 0.5, as in the paper's config for it.

    Args:
        energy: Largest share of E‖u‖² that may lie in the null space.
        l2: L2; ``auto``: E‖P u‖².
    """

    name: ClassVar[str] = "alpha_edit"
    PAPER_BLOCKS = ((13, 14, 15, 16, 17), 48)

    energy: float = 0.1
    l2: float | Literal["auto"] = AUTO
    clamp: float = 0.75

    def build(self) -> None:
        """Checks the options.

        Raises:
            UserError: If the share is not between 0 and 1, or L2 is not above zero.
        """
        super().build()
        self._null_spaces: dict[str, NullSpace] = {}
        if not 0 < self.energy <= 1:
            raise UserError(f"editor {self.name!r}: energy must be a share above 0, at most 1; got {self.energy}")
        if self.l2 != AUTO and not self.l2 > 0:
            raise UserError(f"editor {self.name!r}: l2 must be a number above zero, or auto; got {self.l2}")

    def inverse(self, site: Site, keys: Tensor) -> Tensor:
        null = self.null_space(site)
        return null.solve(null.coordinates(keys), self._l2(null), None)

    def begin_sequence(self) -> dict[str, Tensor]:
        """Returns the state of a sequence without edits: an empty mapping of site → Uᵀ K_p K_pᵀ U."""
        return {}

    def make_next(self, batch: RequestBatch, state: dict[str, Tensor]) -> tuple[LowRankEdit, dict[str, Tensor]]:
        """Computes the next edit of a sequence, which preserves the outputs at the keys of earlier ones.

        Args:
            batch: N requests; the earlier edits are applied to the model.
            state: Returned by `begin_sequence` or the previous call.

        Returns:
            One edit for all of them, and the state for the next call.
        """
        kept: dict[str, Tensor] = {}

        def inverse(site: Site, keys: Tensor) -> Tensor:
            null = self.null_space(site)
            coordinates, before = null.coordinates(keys), state.get(site.name)
            square = coordinates.T @ coordinates
            kept[site.name] = square if before is None else before + square
            return null.solve(coordinates, self._l2(null), before)

        return self.spread(batch, inverse, together=True), kept

    def null_space(self, site: Site) -> NullSpace:
        """Returns the null space at a site, computed on first use.

        Raises:
            UserError: If the share is too small for a single direction.
        """
        if not self._null_spaces:
            matrices = covariances(self.lm, [s.name for s in self.sites], self.text, self.tokens)
            device = self.lm.device
            self._null_spaces = {name: NullSpace(c.to(device), self.energy) for name, c in matrices.items()}
        null = self._null_spaces[site.name]
        if not null.left > 0:
            raise UserError(
                f"editor {self.name!r}: energy {self.energy} leaves {site.name} no direction that plain text uses at "
                "all; use a larger share, or more tokens"
            )
        return null

    def _l2(self, null: NullSpace) -> float:
        return null.left if self.l2 == AUTO else float(self.l2)
