"""ScopeEdit: RidgeEdit's changes, each for the prompts in its scope alone, so that thousands stand side by side."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from instructedit.data.batch import EditBatch, RequestBatch
from instructedit.editors.losses import LossWeights
from instructedit.editors.options import options
from instructedit.editors.ridge_edit import RidgeEdit
from instructedit.edits import Edit, MatchGate, ScopedEdit
from instructedit.lm import FrozenLM, TokenBatch
from instructedit.lm.context import PromptStates

#: What in-scope probes weigh beside those out of scope where a request stands alone: there a change may hold too far,
#: since it leaves alone what it can, but must not be missed. Among many they weigh the same.
ALONE, AMONG_MANY = 0.95, 0.5
#: Where bias, the logarithms of scale and sharpness, and crowd of a `MatchGate` start.
START = {"bias": 3.0, "log_scale": -2.5, "log_sharpness": 1.5, "crowd": 0.5}


class Matcher(nn.Module):
    """Makes the gate of requests, and learns to (see `MatchGate`).

    Args:
        lm: What prompts are read by.
        size: Of k.
        width: Of each t.
        block, token_block: Whose inputs are read.
    """

    def __init__(self, lm: FrozenLM, size: int, width: int, block: int, token_block: int) -> None:
        super().__init__()
        hidden = lm.applied.sites.width
        self.projection = nn.Parameter(torch.randn(size, 2 * hidden) * (2 * hidden) ** -0.5)
        self.token_projection = nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)
        self.importance = nn.Parameter(torch.zeros(hidden))
        self.levels = nn.ParameterDict({name: torch.tensor(value) for name, value in START.items()})
        self.blocks = (block, token_block)

    def gate(self, prompts: PromptStates) -> MatchGate:
        """The scope of each request, around its own prompt; edits of one entry."""
        block, token_block = self.blocks
        states, there = prompts.tokens(token_block)
        words = F.normalize(states @ self.token_projection.T, dim=-1) * there.unsqueeze(-1)
        weights = (states @ self.importance).masked_fill(~there, -torch.inf).softmax(-1)
        level = self.levels
        return MatchGate(
            (prompts(block) @ self.projection.T).unsqueeze(1), words.unsqueeze(1), weights.unsqueeze(1),
            self.projection, self.token_projection, level["bias"], level["log_scale"].exp(),
            level["log_sharpness"].exp(), level["crowd"], torch.tensor(block), torch.tensor(token_block),
        )  # fmt: skip

    def loss(self, requests: PromptStates, probes: PromptStates, own: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of telling each request's probes apart, alone and among all requests of a batch; and accuracy.

        Args:
            requests: Prompts of the requests.
            probes: Prompts of their probes.
            own: Which request each probe is of, [probes].
            inside: Whether it is in scope, bool [probes].

        Returns:
            The loss, and the share of probes that are classified right where their request stands alone, scalars.
        """
        gate = self.gate(requests).joined()
        logits = gate.scores(probes, torch.zeros_like(own))  # [probes, requests]
        wordings = requests.prompts.unpadded()
        same = torch.tensor([[asked == words for words in wordings] for asked in probes.prompts.unpadded()])
        others = torch.arange(len(wordings), device=own.device) != own.unsqueeze(-1)
        logits = logits.masked_fill(others & same.to(own.device), -torch.inf)  # as much in that one's scope
        count = len(wordings)
        alone = logits.gather(-1, own.unsqueeze(-1)).squeeze(-1) + gate.crowd * math.log(count)
        apart = F.binary_cross_entropy_with_logits(alone, inside.to(alone.dtype), reduction="none")
        none = torch.cat([logits, logits.new_zeros(len(logits), 1)], -1)
        among = F.cross_entropy(none, own.where(inside, count), reduction="none")
        right = ((alone > 0) == inside).float().mean()
        return _balanced(apart, inside, ALONE) + _balanced(among, inside, AMONG_MANY), right.detach()


def _balanced(losses: Tensor, inside: Tensor, share: float) -> Tensor:
    """Mean over the probes in scope and over those out of it, the first with this weight, the second with the rest."""
    means = [(losses * part).sum() / part.sum().clamp(min=1) for part in (inside, ~inside)]
    return share * means[0] + (1 - share) * means[1]


@options
class ScopeEdit(RidgeEdit):
    """A prompt is read with the low-rank change of the one edit in whose scope it lies, and else by the LM itself.

    The change is RidgeEdit's, the scope a learned match of the request's prompt with the question by what the frozen LM
    makes of both below the edited blocks (see `MatchGate`), in the place of SERAC's classifier (Mitchell et al. 2022b).
    The change is trained as if it held everywhere, so that it leaves alone what it can; but what is out of scope
    weighs little, and instructions need not be read.

    Edits do not add up: each is made on the unedited LM, and a prompt meets one of them at most, the latest of equals.

    Args:
        embedding: Size of what a prompt asks, as the scope compares it.
        token_embedding: The same for its tokens.
        token_block: Share of the LM's blocks below the hidden states by which tokens are compared.
        scope_weight: Of the scope's loss beside the others.
        reach: Added to the scope's bias, as it was learned: above zero edits are missed less and hold too far more.
        kept_rank: Of a change that is kept; 0 keeps the whole.
    """

    name: ClassVar[str] = "scope_edit"
    changes_weights = False

    instructions: bool = False
    steps: int = 1
    embedding: int = 128
    token_embedding: int = 32
    token_block: float = 0.15
    scope_weight: float = 1.0
    reach: float = 0.0
    kept_rank: int = 0

    def build(self) -> None:
        """Builds RidgeEdit's parts and the scope's."""
        super().build()
        token_block = int(self.token_block * len(self.lm.forward.blocks))
        block = self.lm.first_block(self.names)
        self.matcher = Matcher(self.lm, self.embedding, self.token_embedding, block, token_block)

    def compute_edit(self, batch: RequestBatch) -> Any:
        """N requests → n edits of one entry each; in training their changes, which hold everywhere."""
        changes = super().compute_edit(batch)
        if self.training:
            return changes
        if self.kept_rank:
            changes = changes.compressed(self.kept_rank)
        gate = self.matcher.gate(self._prompts(batch.tokens))
        return ScopedEdit(changes, gate._replace(bias=gate.bias + self.reach))

    def compute_joint_edit(self, batch: RequestBatch) -> Edit:
        """N requests → one edit of n entries."""
        return self.compute_edit(batch).joined()

    def begin_sequence(self) -> Any:
        """Nothing: an edit does not depend on those before."""
        return {}

    def make_next(self, batch: RequestBatch, state: Any) -> tuple[Edit, Any]:
        return self.compute_joint_edit(batch), state

    def training_loss(self, batch: EditBatch, weights: LossWeights) -> dict[str, Tensor]:
        """RidgeEdit's outer loss, and the scope's beside it."""
        parts = super().training_loss(batch, weights)
        probes = [batch.in_scope, *([batch.locality] if batch.locality else [])]
        own = torch.cat([part.request_index for part in probes])
        inside = torch.arange(len(own), device=own.device) < len(batch.in_scope.request_index)
        asked = self._prompts(TokenBatch.cat(batch.tokens))
        loss, right = self.matcher.loss(self._prompts(batch.requests.tokens), asked, own, inside)
        parts["loss"] = parts["loss"] + self.scope_weight * loss
        return parts | {"scope_loss": loss, "scope_accuracy": right}

    def _prompts(self, tokens: TokenBatch) -> PromptStates:
        """Of rows with answers; in training their states are known, or will be asked for."""
        return PromptStates(self.lm.context, tokens.prompts(), tokens if self.training else None)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The scope's parameters take the edit rates' learning rate: it has as few steps, and starts as far off."""
        found = super().parameter_groups()
        own = {id(parameter) for parameter in self.matcher.parameters()}
        network = [parameter for parameter in found["network"] if id(parameter) not in own]
        return {"network": network, "edit_rates": [*found["edit_rates"], *self.matcher.parameters()]}
