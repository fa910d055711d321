"""MEND (Mitchell et al. 2022), and InstructEdit (Tian et al. 2024), which is MEND with instructions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.factored_gradients import linear
from instructedit.editors.gated import gated, gated_each
from instructedit.editors.normalizer import RunningNorm
from instructedit.editors.options import options
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import LayerGradients
from instructedit.rows import in_full, take_rows

#: The paper's edit rate, which ``edit_rate: auto`` stands for until `fit` has measured a better one.
PAPER_RATE = 1e-4


class ResidualLayers(nn.Module):
    """Residual layers on vectors z, shared by all sites of a shape (MEND, section 3.2).

    Each layer computes z ← z + relu((U V z + b) ⊙ s + c) with rank-r factors U, V and the site's own scale s and
    shift c. U is initialised to zero, so that the layers start as the identity.

    Args:
        size: Width of z.
        sites: Number of sites that share the layers.
        rank: Rank of U V, at most ``size``.
        hidden_layers: Number of layers before the last.
    """

    def __init__(self, size: int, sites: int, rank: int, hidden_layers: int) -> None:
        super().__init__()
        layers, rank = hidden_layers + 1, min(rank, size)
        # One parameter per layer: the gradient of a stack would be computed in parts and then copied.
        self.up = nn.ParameterList(torch.zeros(rank, size) for _ in range(layers))
        self.down = nn.ParameterList(torch.randn(size, rank) for _ in range(layers))
        self.bias = nn.Parameter(torch.zeros(layers, size))
        self.scale = nn.Parameter(torch.ones(layers, sites, size))
        self.shift = nn.Parameter(torch.zeros(layers, sites, size))

    def layers(self, z: Tensor, site: Tensor, film: Tensor | None = None, row: Tensor | None = None) -> Tensor:
        """Applies the layers.

        Args:
            z: [tokens, size].
            site: Index of each token's site, [tokens].
            film: Terms that each request adds to scales and shifts, [layers, 2, requests, size].
            row: Index of each token's request, [tokens].

        Returns:
            [tokens, size].
        """
        for i, (up, down, bias) in enumerate(zip(self.up, self.down, self.bias, strict=True)):
            mapped = linear(linear(z, down), up, bias)
            if film is None or row is None:
                z = gated(z, mapped, self.scale[i], self.shift[i], site)
                continue
            scale = take_rows(self.scale[i], site) + take_rows(film[i, 0], row)
            shift = take_rows(self.shift[i], site) + take_rows(film[i, 1], row)
            z = gated_each(z, mapped, scale, shift)
        return z


class GradientNetwork(ResidualLayers):
    """Maps (u, δ) to pseudo-(ũ, δ̃) by residual layers on z = [norm(u); norm(δ)] (MEND, section 3.2).

    Args:
        size_in, size_out: Width of u and of δ.
        sites: Number of sites that share it.
        rank: Rank of its layers.
        hidden_layers: Number of layers before the last.
    """

    def __init__(self, size_in: int, size_out: int, sites: int, rank: int, hidden_layers: int) -> None:
        super().__init__(size_in + size_out, sites, rank, hidden_layers)
        self.split = (size_in, size_out)
        self.norm_u, self.norm_delta = RunningNorm(size_in), RunningNorm(size_out)

    def forward(self, u: Tensor, delta: Tensor, site: Tensor) -> tuple[Tensor, Tensor]:
        """Maps `u` [tokens, in], `delta` [tokens, out] to (ũ, δ̃), given the index of each token's site, [tokens]."""
        new_u, new_delta = self.layers(torch.cat([self.norm_u(u), self.norm_delta(delta)], -1), site).split(
            self.split, -1
        )
        return new_u, new_delta


class SiteTokens(NamedTuple):
    """Tokens of several sites of one shape: `u` [tokens, in], `delta` [tokens, out], and where they belong.

    `site` and `row`, both [tokens], are indices of sites in the group and of requests in the batch.
    """

    u: Tensor
    delta: Tensor
    site: Tensor
    row: Tensor


@options
class Mend(Editor):
    """A hypernetwork that turns the gradient of an edit into a low-rank update: ΔW_ℓ = −α_ℓ Σ_t δ̃_t ũ_tᵀ.

    The paper has rank 1920, one hidden layer, edit rate 1e-4, and edits the MLPs of the last three blocks (appendix B).

    The rates are learned as their logarithms, so that the optimiser changes each in proportion to itself.

    Args:
        rank: Rank of the hypernetwork's layers.
        hidden_layers: Number of its layers before the last.
        edit_rate: Initial value of each site's learned step size α: a number, or ``auto``, the rate with the lowest
            outer loss on a few training records, which `fit` measures before its first step (see `editors.rates`). An
            editor that was never trained uses the paper's 1e-4 instead.
    """

    name: ClassVar[str] = "mend"
    trainable = True

    rank: int = 1920
    hidden_layers: int = 1
    edit_rate: float | Literal["auto"] = "auto"

    def build(self) -> None:
        """Builds one network for each shape of site.

        Raises:
            UserError: If the edit rate is not above zero.
        """
        rate = PAPER_RATE if self.edit_rate == "auto" else self.edit_rate
        if not 0 < rate < math.inf:
            raise UserError(f"editor {self.name!r}: edit_rate must be a number above zero, or auto; got {rate}")
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, site in enumerate(self.sites):
            shapes[site.shape].append(i)
        self.groups = list(shapes.values())
        self.networks = nn.ModuleList(
            GradientNetwork(*shape, len(group), self.rank, self.hidden_layers) for shape, group in shapes.items()
        )
        self.log_alpha = nn.Parameter(torch.full((len(self.sites),), math.log(rate)))
        self.rate_is_open = self.edit_rate == "auto"
        self.register_load_state_dict_pre_hook(_before_loading)

    @property
    def alpha(self) -> Tensor:
        """Edit rate α of each site, [sites]."""
        return self.log_alpha.exp()

    @torch.no_grad()
    def start_at(self, rate: float) -> None:
        """Sets the edit rate of all sites."""
        self.log_alpha.fill_(math.log(rate))
        self.rate_is_open = False

    def upgrade(self, weights: dict[str, Tensor], prefix: str = "") -> bool:
        if (alpha := weights.pop(f"{prefix}alpha", None)) is None:
            return False
        # Older versions learned the rates themselves, whose signs could change.
        weights[f"{prefix}log_alpha"] = alpha.abs().clamp(min=torch.finfo(alpha.dtype).tiny).log()
        return True

    def compute_edit(self, batch: RequestBatch) -> LowRankEdit:
        """Computes equation 3 of InstructEdit for all requests and sites at once.

        The networks see all tokens of all requests and of all sites that share a shape in one call. Tokens whose δ is
        zero (padding, and positions that the edit loss does not depend on) are dropped.
        """
        return LowRankEdit(self.factors(self.lm.capture(batch.tokens, self.names), self.pseudo))

    @property
    def names(self) -> list[str]:
        """Names of the sites."""
        return [site.name for site in self.sites]

    def pseudo(self, group: int, tokens: SiteTokens) -> tuple[Tensor, Tensor]:
        """Computes (ũ, −α δ̃), which replaces (u, δ) in an edit, for the tokens of a group of sites."""
        new_u, new_delta = self.networks[group](tokens.u, tokens.delta, tokens.site)
        alpha = self.alpha[torch.tensor(self.groups[group], device=new_u.device)]
        return new_u, -take_rows(alpha, tokens.site).unsqueeze(-1) * new_delta

    def factors(
        self, captured: LayerGradients, pseudo: Callable[[int, SiteTokens], tuple[Tensor, Tensor]]
    ) -> dict[str, Factors]:
        """Applies `pseudo` to the tokens that an edit loss depends on, and returns each site's factors.

        Args:
            captured: Inputs and gradients of the edit loss at the sites.
            pseudo: Maps the index of a group of sites of one shape and their tokens to [tokens, in] and
                [tokens, out].
        """
        names = self.names
        factors: dict[str, Factors] = {}
        for number, group in enumerate(self.groups):
            u = in_full(torch.stack([captured.u[names[i]] for i in group]))
            delta = in_full(torch.stack([captured.delta[names[i]] for i in group]))
            (site, row, at, slot), width = _slots((delta != 0).any(-1))
            new_u, new_delta = pseudo(number, SiteTokens(u[site, row, at], delta[site, row, at], site, row))
            a = u.new_zeros(*u.shape[:2], width, u.shape[-1]).index_put((site, row, slot), new_u)
            b = u.new_zeros(*u.shape[:2], width, delta.shape[-1]).index_put((site, row, slot), new_delta)
            # unbind has one backward node for all sites, indexing one for each
            factors |= {names[i]: Factors(*own) for i, *own in zip(group, a.unbind(), b.unbind(), strict=True)}
        return {name: factors[name] for name in names}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"network": list(self.networks.parameters()), "edit_rates": [self.log_alpha]}

    def monitored(self) -> dict[str, Tensor]:
        return {"edit_rates": self.log_alpha}


def _before_loading(editor: Mend, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Upgrades weights before they are loaded, and marks their edit rates as already measured."""
    editor.upgrade(weights, prefix)
    editor.rate_is_open = False


def _slots(kept: Tensor) -> tuple[Tensor, int]:
    """Locates the tokens that a mask [sites, rows, positions] keeps; on the host, which waits for the device once.

    Returns:
        Site, row, position, and rank among the tokens kept of the same row, [4, tokens]; most tokens kept of a row.
    """
    host = kept.cpu()
    reached = host.cumsum(-1)
    site, row, at = host.nonzero(as_tuple=True)
    where = torch.stack([site, row, at, reached[site, row, at] - 1])
    return where.to(kept.device), int(reached.max())


@options
class InstructEdit(Mend):
    """MEND with the task's instruction prepended to every request (Tian et al. 2024, section 4.2)."""

    name: ClassVar[str] = "instructedit"

    instructions: bool = True
