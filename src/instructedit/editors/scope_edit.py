"""ScopeEdit: RidgeEdit's changes, each for the prompts in its scope alone, so that thousands stand side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from instructedit.data.batch import EditBatch, RequestBatch
from instructedit.editors.losses import LossWeights
from instructedit.editors.matching import Matcher
from instructedit.editors.options import options
from instructedit.editors.ridge_edit import RidgeEdit
from instructedit.edits import Edit, ScopedEdit
from instructedit.lm import TokenBatch
from instructedit.lm.context import PromptStates
from instructedit.lm.tokens import rows_of
from instructedit.records import EditRequest


@options
class ScopeEdit(RidgeEdit):
    """A prompt is read with the low-rank change of the one edit in whose scope it lies, and else by the LM itself.

    The change is RidgeEdit's, the scope a learned match of the request's prompt with the question by what the frozen LM
    makes of both below the edited blocks (see `MatchGate`), in the place of SERAC's classifier (Mitchell et al. 2022b).
    The change is trained as if it held everywhere, so that it leaves alone what it can; but what is out of scope
    weighs little, and instructions need not be read.

    Edits do not add up: each is made on the unedited LM, and a prompt meets one of them at most, the latest of equals.

    Args:
        embedding: Size of the vector by which the scope compares prompts as wholes.
        token_embedding: Size of the vectors by which it compares their tokens.
        prompt_block: Share of the LM's blocks below the hidden states by which prompts are compared as wholes; at most
            those below the first edited block.
        token_block: The same for the hidden states by which tokens are compared.
        competitors: Number of requests of earlier batches among which the scope learns to find a batch's own.
        crossed: Number of prompts for each request that ask what another request of the batch asks, but about this
            one's subject, and so are out of scope.
        scope_weight: Weight of the scope's loss, added to the editing loss.
        reach: Added to the scope's learned bias: above zero, fewer edits are missed and more hold too far.
        kept_rank: Rank to which a change is reduced when it is made; 0 keeps it whole.
    """

    name: ClassVar[str] = "scope_edit"
    changes_weights = False

    instructions: bool = False
    steps: int = 1
    embedding: int = 128
    token_embedding: int = 32
    prompt_block: float = 1.0
    token_block: float = 0.15
    competitors: int = 80
    crossed: int = 0
    scope_weight: float = 1.0
    reach: float = 0.0
    kept_rank: int = 0

    def build(self) -> None:
        """Builds the parts of RidgeEdit and the scope's matcher."""
        super().build()
        top = self.lm.first_block(self.names)
        block, token_block = (
            min(top, int(share * len(self.lm.forward.blocks))) for share in (self.prompt_block, self.token_block)
        )
        self.matcher = Matcher(self.lm, self.embedding, self.token_embedding, block, token_block, self.competitors)

    def compute_edit(self, batch: RequestBatch) -> Any:
        """Computes n edits of one entry each for N requests; in training their changes, which hold everywhere."""
        changes = super().compute_edit(batch)
        if self.training:
            return changes
        if self.kept_rank:
            changes = changes.compressed(self.kept_rank)
        gate = self.matcher.gate(self._prompts(batch.tokens))
        return ScopedEdit(changes, gate._replace(bias=gate.bias + self.reach))

    def compute_joint_edit(self, batch: RequestBatch) -> Edit:
        """Computes one edit of n entries for N requests."""
        return self.compute_edit(batch).joined()

    def begin_sequence(self) -> Any:
        """Returns an empty state: an edit does not depend on those before."""
        return {}

    def make_next(self, batch: RequestBatch, state: Any) -> tuple[Edit, Any]:
        return self.compute_joint_edit(batch), state

    def training_loss(self, batch: EditBatch, weights: LossWeights) -> dict[str, Tensor]:
        """Computes RidgeEdit's outer loss plus the scope's."""
        self.lm.prefixes.stages.update(self.matcher.blocks)
        losses = super().training_loss(batch, weights)
        crossed, of = self._crossed(batch)
        probes = [batch.in_scope, *([batch.locality] if batch.locality else [])]
        own = torch.cat([part.request_index for part in probes] + [of])
        inside = torch.arange(len(own), device=own.device) < len(batch.in_scope.request_index)
        requests = self._prompts(batch.requests.tokens)
        loss, right = self.matcher.loss(requests, self._prompts(TokenBatch.cat([*batch.tokens, *crossed])), own, inside)
        self.matcher.remember(requests)
        losses["loss"] = losses["loss"] + self.scope_weight * loss
        return losses | {"scope_loss": loss, "scope_accuracy": right}

    def _crossed(self, batch: EditBatch) -> tuple[list[TokenBatch], Tensor]:
        """Asks about each request's subject what the next requests of the batch ask about theirs.

        Returns:
            The prompts that the model has room for (no batch if there are none), and the index of each one's request.
        """
        requests = batch.requests.requests
        templates = [_template(request) for request in requests]
        asked: list[tuple[str, int]] = []
        for i, own in enumerate(templates):
            others = dict.fromkeys(other for other in [*templates[i + 1 :], *templates[:i]] if other and other != own)
            chosen = list(others)[: self.crossed if own else 0]
            asked += [(f"{before}{requests[i].subject}{after}", i) for before, after in chosen]
        prompts = self.lm.text.prompts([prompt for prompt, _ in asked])
        fitting = [(ids, i) for ids, (_, i) in zip(prompts, asked, strict=True) if len(ids) <= self.lm.max_length]
        of = torch.tensor([i for _, i in fitting], dtype=torch.long, device=self.lm.device)
        return [rows_of([ids for ids, _ in fitting]).to(self.lm.device)] if fitting else [], of

    def _prompts(self, tokens: TokenBatch) -> PromptStates:
        """Returns the prompts of rows with answers; in training the rows' own states are used, which are known."""
        return PromptStates(self.lm.context, tokens.prompts(), tokens if self.training else None)

    def training_state(self) -> dict[str, Any]:
        """Returns the scope's competitors."""
        return {"competitors": self.matcher.memory()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Takes the scope's competitors from a checkpoint."""
        self.matcher.recall(state["competitors"])

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups the scope's parameters with the edit rates: they have few steps too, and start as far off."""
        found = super().parameter_groups()
        own = {id(parameter) for parameter in self.matcher.parameters()}
        network = [parameter for parameter in found["network"] if id(parameter) not in own]
        return {"network": network, "edit_rates": [*found["edit_rates"], *self.matcher.parameters()]}


def _template(request: EditRequest) -> tuple[str, str] | None:
    """Returns a request's prompt before and after its subject; None if the subject is unknown or not in it."""
    before, subject, after = request.prompt.partition(request.subject or request.prompt)
    return (before, after) if subject == request.subject else None
