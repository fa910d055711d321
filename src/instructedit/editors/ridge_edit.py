"""RidgeEdit: ridge regression from keys to a hypernetwork's values, in two steps, with requests read plainly.

The instruction conditions the hypernetwork instead of being prepended to the request, so that an edit holds with or
without it. Values are MEND's (Mitchell et al. 2022), keys ROME's (Meng et al. 2022), and the solve that joins them is
MALMEN's (Tan et al. 2024) with a prior over keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from instructedit.data.batch import RequestBatch
from instructedit.editors.mend import Mend, ResidualLayers, SiteTokens
from instructedit.editors.options import options
from instructedit.editors.ridge import PastKeys, PriorKeys, ridge
from instructedit.edits import Edit, Factors, LowRankEdit
from instructedit.errors import at_least
from instructedit.lm.covariance import covariances
from instructedit.lm.own_text import text_for
from instructedit.lm.tokens import TokenBatch, rows_of
from instructedit.rows import take_rows

#: Initial weights λ₀ of the prior and λ₁ of the identity, as shares of a key's squared size.
PRIOR, IDENTITY = 1.0, 0.1


class Condition(nn.Module):
    """Terms that an instruction adds to scales and shifts of residual layers (FiLM; Perez et al. 2018), zero at first.

    Args:
        size_in: Width of the instruction's state.
        rank: Width of the bottleneck.
        sizes: Width of each group's layers.
        layers: Number of layers in each group.
    """

    def __init__(self, size_in: int, rank: int, sizes: Sequence[int], layers: int) -> None:
        super().__init__()
        self.shapes = [(layers, 2, size) for size in sizes]
        self.down = nn.Parameter(torch.randn(size_in, rank) / math.sqrt(size_in))
        self.up = nn.ParameterList(torch.zeros(rank, math.prod(shape)) for shape in self.shapes)

    def forward(self, states: Tensor) -> list[Tensor]:
        """Maps states of instructions [n, size_in] to the terms of each group, [layers, 2, n, size]."""
        inner = states @ self.down
        parts = [(inner @ up).view(len(states), *shape) for up, shape in zip(self.up, self.shapes, strict=True)]
        return [part.permute(1, 2, 0, 3) for part in parts]


@options
class RidgeEdit(Mend):
    """Solves ΔW = V (I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹ for a request's keys K, and values V from a hypernetwork.

    C = λ₀ E[u uᵀ] + λ₁ I and v_t = −α (norm(u_t)ᵀ ũ_t / in) δ̃_t. A second step edits the edited model once more, from
    the remaining gradient and by a smaller network. The first step reads the request without its instruction, which
    scales and shifts the hypernetwork's layers instead.

    Args:
        steps: 1, or 2 with the second step.
        second_rank: Rank of the second step's layers.
        second_reads: Text for the second step's gradient: the ``plain`` request, or ``both``, that and the request
            after its instruction.
        ridge: Solve for the update; otherwise it is MEND's Σ_t −α δ̃_t ũ_tᵀ.
        film_rank: Width through which an instruction conditions the layers; 0 ignores instructions.
        ends: Teach the model to end its text after a target.
        together: Number of requests in a training batch that share one edit, under which all of them and their
            locality probes are scored: training for joint edits and for sequences of edits. A batch size that it does
            not divide gives each request its own edit.
        text: Text for E[u uᵀ], see ROME's option.
        tokens: Number of tokens of this text.
    """

    name: ClassVar[str] = "ridge_edit"
    INSTRUCTIONS_APART: ClassVar[bool] = True

    instructions: bool = True
    steps: int = 2
    second_rank: int = 64
    second_reads: Literal["plain", "both"] = "both"
    ridge: bool = True
    film_rank: int = 64
    ends: bool = True
    together: int = 1
    text: str = "auto"
    tokens: int = 20_000

    def build(self) -> None:
        """Builds the networks of both steps, their conditions, and the weights of the ridge.

        Raises:
            UserError: If there is no step, or no request in an edit.
        """
        counts = {"steps": self.steps, "together": self.together}
        at_least(1, **{f"editor {self.name!r}: {option}": count for option, count in counts.items()})
        super().build()
        self._tokenization = self.lm.text.ended(self.ends)
        self._priors: dict[str, PriorKeys] = {}
        self.text = text_for(self.lm, self.text)
        sizes = [sum(self.sites[group[0]].shape) for group in self.groups]
        layers = self.hidden_layers + 1
        self.further = nn.ModuleList(
            ResidualLayers(size, len(group), self.second_rank, self.hidden_layers)
            for size, group in zip(sizes, self.groups, strict=True)
            if self.steps > 1
        )
        self.conditions = nn.ModuleList(
            Condition(2 * self.lm.applied.sites.width, self.film_rank, sizes, layers)
            for _ in range(self.steps if self.film_rank else 0)
        )
        self.log_alpha_second = nn.Parameter(self.log_alpha.detach().clone())
        start = torch.tensor([PRIOR, IDENTITY]) * torch.tensor([[site.shape[0]] for site in self.sites])
        self.log_ridge = nn.Parameter(start.log())

    @torch.no_grad()
    def start_at(self, rate: float) -> None:
        super().start_at(rate)
        self.log_alpha_second.fill_(math.log(rate))

    def compute_edit(self, batch: RequestBatch) -> Any:
        """Computes n edits for n requests (`LowRankEdit`); with two steps their factors are concatenated.

        In training there are n / together edits, and request i has the one of index i mod (n / together).
        """
        count = len(batch)
        if not self.training or count % self.together:
            return self._made(batch, count)[0]
        edits = count // self.together
        made = self._made(batch, edits)[0]
        return made if edits in (1, count) else made[[i % edits for i in range(count)]]

    def compute_joint_edit(self, batch: RequestBatch) -> Edit:
        """Computes one ridge solution for the keys of all n requests."""
        return self._made(batch, 1)[0]

    def begin_sequence(self) -> Any:
        """Returns C⁻¹ of each site before any edit; an empty state without ridge."""
        if not self.ridge:
            return {}
        weights = self.log_ridge.detach().float()
        found = {}
        for name, log_weights in zip(self.names, weights, strict=True):
            size = self.prior(name).values.numel()
            found[name] = PastKeys(self.prior(name).solve(torch.eye(size, device=weights.device), log_weights))
        return found

    def make_next(self, batch: RequestBatch, state: Any) -> tuple[Edit, Any]:
        """Computes the next edit with the keys of all earlier edits in C, so that it preserves these edits."""
        edit, keys = self._made(batch, 1, state)
        return edit, {name: past.and_these(keys[name][0].detach()) for name, past in state.items()}

    def _made(
        self, batch: RequestBatch, edits: int, past: Mapping[str, PastKeys] | None = None
    ) -> tuple[LowRankEdit, dict[str, Tensor]]:
        """Computes `edits` edits for a batch, one per request or shared, and returns the keys of the last step too."""
        states = self._instruction_states(batch)
        made: LowRankEdit | None = None
        for step in range(self.steps):
            tokens = self._readings(batch) if step else batch.tokens
            rows = torch.arange(len(tokens), device=tokens.device) % len(batch)
            films = self.conditions[step](take_rows(states, rows)) if self.film_rank else [None] * len(self.groups)
            captured = self.lm.capture(tokens, self.names, made and made.detach(), rows % edits if made else None)
            found = {
                name: _gathered(factors, edits)
                for name, factors in self.factors(captured, partial(self._values, step, films)).items()
            }
            keys = {name: factors.a / self.prior(name).unit for name, factors in found.items()} if self.ridge else {}
            if self.ridge:
                found = {name: self._solved(name, keys[name], factors.b, past) for name, factors in found.items()}
            edit = LowRankEdit(found)
            made = edit if made is None else made.plus(edit)
        assert made is not None
        return made, keys

    def _readings(self, batch: RequestBatch) -> TokenBatch:
        """Returns the rows for the second step's gradient: request i is row i, and if read twice also row n + i."""
        if self.second_reads == "plain" or not any(batch.instructions):
            return batch.tokens
        pairs = zip(batch.instructions, batch.requests, strict=True)
        instructed = self.tokenization.encode([(text + r.prompt, r.target) for text, r in pairs]).to(
            batch.tokens.device
        )
        return TokenBatch.cat([batch.tokens, instructed])

    def _values(
        self, step: int, films: Sequence[Tensor | None], group: int, tokens: SiteTokens
    ) -> tuple[Tensor, Tensor]:
        """Computes keys and values of a group's tokens; without ridge MEND's pseudo-(ũ, −α δ̃)."""
        network: Any = self.networks[group]
        norms = (network.norm_u, network.norm_delta)
        # The second step uses the first one's statistics: the less gradient remains, the less it changes.
        u, delta = (
            norm(x) if step == 0 else norm.standardised(x)
            for norm, x in zip(norms, (tokens.u, tokens.delta), strict=True)
        )
        layers: Any = network if step == 0 else self.further[group]
        new = layers.layers(torch.cat([u, delta], -1), tokens.site, films[group], tokens.row)
        new_u, new_delta = new.split(network.split, -1)
        rates = (self.log_alpha if step == 0 else self.log_alpha_second).exp()
        own = rates[torch.tensor(self.groups[group], device=u.device)]
        alpha = take_rows(own, tokens.site).unsqueeze(-1)
        if not self.ridge:
            return new_u, -alpha * new_delta
        return tokens.u, -alpha * (u * new_u).mean(-1, keepdim=True) * new_delta

    def prior(self, site: str) -> PriorKeys:
        """Returns the prior over the keys of a site, computed on first use."""
        if not self._priors:
            matrices = covariances(self.lm, self.names, self.text, self.tokens)
            self._priors = {name: PriorKeys(matrix.to(self.lm.device)) for name, matrix in matrices.items()}
        return self._priors[site]

    def _solved(self, site: str, keys: Tensor, values: Tensor, past: Mapping[str, PastKeys] | None) -> Factors:
        """Solves the ridge regressions at a site and returns them as factors."""
        if past is None:
            solved = self.prior(site).solve(keys, self.log_ridge[self.names.index(site)])
        else:
            solved = keys @ past[site].inverse
        return Factors(solved / self.prior(site).unit, ridge(keys, solved, values))

    @torch.no_grad()
    def _instruction_states(self, batch: RequestBatch) -> Tensor:
        """Computes the frozen LM's states of each request's instruction, [n, 2 · hidden]; zeros if it has none."""
        states = torch.zeros(len(batch), 2 * self.lm.applied.sites.width, device=self.lm.device)
        if not self.film_rank or not (different := sorted({text for text in batch.instructions if text})):
            return states
        rows = rows_of(self.lm.text.prompts(different)).to(self.lm.device)
        found = self.lm.context.scope_embedding(rows, self.lm.first_block(self.names)).float()
        for number, text in enumerate(batch.instructions):
            if text:
                states[number] = found[different.index(text)]
        return states

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        rates = [self.log_alpha, self.log_alpha_second, self.log_ridge]
        known = {id(rate) for rate in rates}
        return {"network": [p for p in self.parameters() if id(p) not in known], "edit_rates": rates}


def _gathered(factors: Factors, edits: int) -> Factors:
    """Concatenates the factors of all rows that share an edit, [rows, rank, …] → [edits, more, …]."""
    a, b = (f.unflatten(0, (-1, edits)).transpose(0, 1).flatten(1, 2) for f in factors)
    return Factors(a, b)
