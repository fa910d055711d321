"""MEND (Mitchell et al. 2022), and InstructEdit (Tian et al. 2024), which is MEND with instructions."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.factored_gradients import linear
from instructedit.editors.normalizer import RunningNorm
from instructedit.editors.options import options
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError

#: The paper's edit rate: what ``edit_rate: auto`` stands for until `fit` has measured a better one.
PAPER_RATE = 1e-4


class GradientNetwork(nn.Module):
    """Maps normalised (u, δ) to pseudo-(ũ, δ̃); one network serves all sites of a shape (MEND, section 3.2).

    z = [norm(u); norm(δ)]; in each layer z ← z + relu((U V z + b) ⊙ s + c) with rank-r factors U, V and a scale s and
    shift c of the site's own. U starts at zero, so that the network starts as the identity.

    Args:
        size_in, size_out: Width of u and of δ.
        sites: How many sites share it.
        rank: Of U V, at most ``size_in + size_out``.
        hidden_layers: Layers beside the last.
    """

    def __init__(self, size_in: int, size_out: int, sites: int, rank: int, hidden_layers: int) -> None:
        super().__init__()
        size, layers = size_in + size_out, hidden_layers + 1
        self.split = (size_in, size_out)
        rank = min(rank, size)
        self.norm_u, self.norm_delta = RunningNorm(size_in), RunningNorm(size_out)
        # One parameter a layer: the gradient of a stack would be made in parts and then copied.
        self.up = nn.ParameterList(torch.zeros(rank, size) for _ in range(layers))
        self.down = nn.ParameterList(torch.randn(size, rank) for _ in range(layers))
        self.bias = nn.Parameter(torch.zeros(layers, size))
        self.scale = nn.Parameter(torch.ones(layers, sites, size))
        self.shift = nn.Parameter(torch.zeros(layers, sites, size))

    def forward(self, u: Tensor, delta: Tensor, site: Tensor) -> tuple[Tensor, Tensor]:
        """Args: u [tokens, in], delta [tokens, out], site [tokens] number of each token's site. Returns (ũ, δ̃)."""
        z = torch.cat([self.norm_u(u), self.norm_delta(delta)], -1)
        for up, down, bias, scale, shift in zip(self.up, self.down, self.bias, self.scale, self.shift, strict=True):
            mapped = linear(linear(z, down), up, bias)
            # clamp, unlike relu, has slope 1 at zero, where the identity start puts every unit
            z = z + torch.addcmul(shift[site], mapped, scale[site]).clamp(min=0)
        new_u, new_delta = z.split(self.split, -1)
        return new_u, new_delta


@options
class Mend(Editor):
    """A hypernetwork that turns the gradient of an edit into a low-rank update: ΔW_ℓ = −α_ℓ Σ_t δ̃_t ũ_tᵀ.

    Paper: rank 1920, one hidden layer, edit rate 1e-4, the MLPs of the last three blocks (MEND, appendix B).

    The rates are learned as their logarithms, so that a step of the optimiser changes each by a share of itself.

    Args:
        rank: Of the hypernetwork's layers.
        hidden_layers: Its layers beside the last.
        edit_rate: Where each site's learned step size α starts: a number, or ``auto``, the rate with the least outer
            loss on a few training records, which `fit` measures before its first step (see `editors.rates`). An
            editor that was never trained has the paper's 1e-4 in its place.
    """

    name: ClassVar[str] = "mend"
    trainable = True

    rank: int = 1920
    hidden_layers: int = 1
    edit_rate: float | Literal["auto"] = "auto"

    def build(self) -> None:
        """One network for each shape of site.

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
        # Rates were learned as they are, and free to change their sign.
        weights[f"{prefix}log_alpha"] = alpha.abs().clamp(min=torch.finfo(alpha.dtype).tiny).log()
        return True

    def compute_edit(self, batch: RequestBatch) -> LowRankEdit:
        """Equation 3 of InstructEdit for every request and site at once.

        The networks see all tokens of all requests and of all sites that share a shape in one call. Tokens whose δ is
        zero (padding, and positions that the edit loss does not read) are dropped.
        """
        names = [site.name for site in self.sites]
        seen, alpha = self.lm.capture(batch.tokens, names), self.alpha
        factors: dict[str, Factors] = {}
        for group, network in zip(self.groups, self.networks, strict=True):
            u = torch.stack([seen.u[names[i]] for i in group]).float()
            delta = torch.stack([seen.delta[names[i]] for i in group]).float()
            (site, row, at, slot), width = _slots((delta != 0).any(-1))
            new_u, new_delta = network(u[site, row, at], delta[site, row, at], site)
            new_delta = -alpha[torch.tensor(group, device=u.device)][site].unsqueeze(-1) * new_delta
            a = u.new_zeros(*u.shape[:2], width, u.shape[-1]).index_put((site, row, slot), new_u)
            b = u.new_zeros(*u.shape[:2], width, delta.shape[-1]).index_put((site, row, slot), new_delta)
            factors |= {names[i]: Factors(a[j], b[j]) for j, i in enumerate(group)}
        return LowRankEdit({name: factors[name] for name in names})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"network": list(self.networks.parameters()), "edit_rates": [self.log_alpha]}

    def monitored(self) -> dict[str, Tensor]:
        return {"edit_rates": self.log_alpha}


def _before_loading(editor: Mend, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Saved rates are found ones, whichever version saved them."""
    editor.upgrade(weights, prefix)
    editor.rate_is_open = False


def _slots(kept: Tensor) -> tuple[Tensor, int]:
    """Where a mask [sites, rows, positions] keeps tokens; found on the host, which waits for the device once.

    Returns:
        Site, row, position, and place among those kept of the same row, [4, tokens]; most kept of a row.
    """
    host = kept.cpu()
    reached = host.cumsum(-1)
    site, row, at = host.nonzero(as_tuple=True)
    where = torch.stack([site, row, at, reached[site, row, at] - 1])
    return where.to(kept.device), int(reached.max())


@options
class InstructEdit(Mend):
    """MEND that reads the task's instruction in front of every request (Tian et al. 2024, section 4.2)."""

    name: ClassVar[str] = "instructedit"

    instructions: bool = True
