"""The scope of an edit, learned: matches a request's prompt with the prompts that are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from instructedit.edits import MatchGate
from instructedit.edits.gates import Prompts, token_weights
from instructedit.lm import FrozenLM
from instructedit.lm.context import PromptStates

#: Weight of in-scope probes against those out of scope where a request is compared alone. A change that holds too far
#: still leaves alone what it can, but an edit that is missed is lost; among many requests both weigh the same.
ALONE, AMONG_MANY = 0.8, 0.5
#: Initial bias, logarithms of scale, sharpness and backward, and crowd of a `MatchGate`.
START = {"bias": 3.0, "log_scale": -2.5, "log_sharpness": 1.5, "log_backward": 0.5, "crowd": 0.1}
#: What earlier versions lacked, and the values at which it has no effect.
ABSENT = {"opening": 0.0, "levels.log_backward": -100.0}


class KnownPrompts(NamedTuple):
    """Prompts of earlier batches with what the gate reads of them (see `edits.gates.Prompts`).

    Attributes:
        wordings: Token ids of each prompt.
        whole: What the gate reads of a prompt as a whole, [prompts, 2 · hidden].
        states: Hidden states at each token, [prompts, seq, hidden].
        there: Which tokens exist, bool [prompts, seq].
    """

    wordings: list[list[int]]
    whole: Tensor
    states: Tensor
    there: Tensor

    def __call__(self, block: int) -> Tensor:
        """Returns what was read of the prompts as a whole; the block was chosen then."""
        return self.whole

    def tokens(self, block: int) -> tuple[Tensor, Tensor]:
        """Returns the states at each token and which exist; the block was chosen then."""
        return self.states, self.there

    def to(self, device: torch.device) -> Self:
        """Moves the tensors to another device."""
        return self._replace(**{name: getattr(self, name).to(device) for name in ("whole", "states", "there")})


class Matcher(nn.Module):
    """Makes the gate of requests, and learns to (see `MatchGate`).

    Requests of earlier batches stay known as competitors: what is asked must be distinguished from these, too, so that
    the gate learns what a crowd of edits costs although a batch has few. The LM is frozen, so their states do not age.

    Args:
        lm: The LM whose hidden states of prompts are compared.
        size: Size of k.
        width: Size of each t.
        block, token_block: Blocks whose inputs are read.
        competitors: Number of requests of earlier batches that a loss compares with.
        among: Weight of telling probes apart among all requests, next to doing so alone.
    """

    def __init__(
        self,
        lm: FrozenLM,
        size: int,
        width: int,
        block: int,
        token_block: int,
        competitors: int = 0,
        among: float = 1.0,
    ) -> None:
        super().__init__()
        hidden = lm.applied.sites.width
        self.projection = nn.Parameter(torch.randn(size, 2 * hidden) * (2 * hidden) ** -0.5)
        self.token_projection = nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)
        self.importance = nn.Parameter(torch.zeros(hidden))
        self.opening = nn.Parameter(torch.zeros(2 * hidden))
        self.levels = nn.ParameterDict({name: torch.tensor(value) for name, value in START.items()})
        self.blocks, self.competitors, self.among = (block, token_block), competitors, among
        self.known: list[KnownPrompts] = []  # one for each of the last batches

    def gate(self, prompts: Prompts) -> MatchGate:
        """Makes the scope of each request around its own prompt, as edits of one entry."""
        block, token_block = self.blocks
        states, there = prompts.tokens(token_block)
        words = F.normalize(states @ self.token_projection.T, dim=-1) * there.unsqueeze(-1)
        weights = token_weights(states, there, self.importance)
        level = self.levels
        return MatchGate(
            (prompts(block) @ self.projection.T).unsqueeze(1), words.unsqueeze(1), weights.unsqueeze(1),
            self.projection, self.token_projection, self.opening * len(self.opening) ** -0.5, self.importance,
            level["bias"], level["log_scale"].exp(), level["log_sharpness"].exp(), level["log_backward"].exp(),
            level["crowd"], torch.tensor(block), torch.tensor(token_block),
        )  # fmt: skip

    def loss(
        self, requests: PromptStates, probes: PromptStates, own: Tensor, inside: Tensor, crowded: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Computes the cross-entropy of telling probes apart, alone and among all requests of this and known batches.

        Args:
            requests: Prompts of the requests.
            probes: Prompts of their probes.
            own: Which request each probe belongs to, [probes].
            inside: Whether it is in scope, bool [probes].
            crowded: Whether the requests of known batches are among all.

        Returns:
            The loss, and the share of probes that are classified correctly against their own request alone, scalars.
        """
        gate, wordings = self.gate(requests).joined(), requests.prompts.unpadded()
        for known in (each.to(own.device) for each in self.known if crowded):
            gate, wordings = gate.beside(self.gate(known).joined()), wordings + known.wordings
        logits = gate.scores(probes, torch.zeros_like(own))  # [probes, requests]
        same = torch.tensor([[asked == words for words in wordings] for asked in probes.prompts.unpadded()])
        others = torch.arange(len(wordings), device=own.device) != own.unsqueeze(-1)
        logits = logits.masked_fill(others & same.to(own.device), -torch.inf)  # equally in that one's scope
        count = len(wordings)
        alone = logits.gather(-1, own.unsqueeze(-1)).squeeze(-1) + gate.crowd * math.log(count)
        apart = F.binary_cross_entropy_with_logits(alone, inside.to(alone.dtype), reduction="none")
        none = torch.cat([logits, logits.new_zeros(len(logits), 1)], -1)
        among = F.cross_entropy(none, own.where(inside, count), reduction="none")
        right = ((alone > 0) == inside).float().mean()
        loss = _balanced(apart, inside, ALONE) + self.among * _balanced(among, inside, AMONG_MANY)
        return loss, right.detach()

    @torch.no_grad()
    def remember(self, requests: PromptStates) -> None:
        """Adds a batch's requests to the competitors of later ones; the oldest batches beyond their number go."""
        block, token_block = self.blocks
        known = [*self.known, KnownPrompts(requests.prompts.unpadded(), requests(block), *requests.tokens(token_block))]
        while sum(len(each.wordings) for each in known) > self.competitors:
            known.pop(0)
        self.known = known

    def memory(self) -> list[dict[str, Any]]:
        """Returns the competitors as plain values, for a checkpoint."""
        return [known._asdict() for known in self.known]

    def recall(self, memory: Sequence[dict[str, Any]]) -> None:
        """Takes the competitors from a checkpoint."""
        self.known = [KnownPrompts(**each) for each in memory]


def _balanced(losses: Tensor, inside: Tensor, share: float) -> Tensor:
    """Returns the mean over probes in scope, weighted by `share`, plus that over the others, weighted by the rest."""
    means = [(losses * part).sum() / part.sum().clamp(min=1) for part in (inside, ~inside)]
    return share * means[0] + (1 - share) * means[1]
