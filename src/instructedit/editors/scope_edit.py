"""ScopeEdit: RidgeEdit's changes, each for the prompts in its scope alone, so that thousands stand side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from instructedit.data.batch import EditBatch, RequestBatch
from instructedit.editors.crossing import Crossing
from instructedit.editors.losses import LossWeights
from instructedit.editors.matching import ABSENT, Matcher
from instructedit.editors.options import adjustable, options
from instructedit.editors.relations import draw_questions
from instructedit.editors.ridge_edit import RidgeEdit
from instructedit.edits import Edit, ScopedEdit
from instructedit.instructions import Instructor
from instructedit.lm import TokenBatch
from instructedit.lm.context import PromptStates
from instructedit.lm.tokens import rows_of


@options
class ScopeEdit(RidgeEdit):
    """A prompt is read with the low-rank change of the one edit in whose scope it lies, and else by the LM itself.

    The change is RidgeEdit's, the scope a learned match of the request's prompt with the question by what the frozen LM
    makes of both below the edited blocks (see `MatchGate`), in the place of SERAC's classifier (Mitchell et al. 2022b).
    The change is trained as if it held everywhere, so that it leaves alone what it can; but what is out of scope
    weighs little. A request is read plainly and needs no instruction; with ``instructions``, what is in its scope is
    asked both plainly and behind one in training.

    Edits do not add up: each is made on the unedited LM, and a prompt meets one of them at most, the latest of equals.

    Args:
        embedding: Size of the vector by which the scope compares prompts as wholes.
        token_embedding: Size of the vectors by which it compares their tokens.
        prompt_block: Share of the LM's blocks below the hidden states by which prompts are compared as wholes; at most
            those below the first edited block.
        token_block: The same for the hidden states by which tokens are compared.
        competitors: Number of requests of earlier batches among which the scope learns to find a batch's own.
        among: Weight, within the scope's loss, of finding a batch's own requests among all, next to telling a request's
            probes apart when it is alone.
        crossed: Most questions for each request that ask something else about its subject and are requests to the
            scope's loss (see `Crossing`).
        other_subjects: Most questions for each request, crossed ones included, that ask the same about another subject
            and are out of its scope.
        relations: Number of questions from the package's own bank of relations that the scope learns from in each step,
            apart from the batch (see `draw_questions`).
        scope_weight: Weight of the scope's loss, added to the editing loss.
        reach: Added to the scope's learned bias: the larger, the fewer edits are missed and the more hold too far. It
            may change after training.
        kept_rank: Rank to which a change is reduced when it is made; 0 keeps it whole. It may change after training.
    """

    name: ClassVar[str] = "scope_edit"
    changes_weights = False

    instructions: bool = False
    steps: int = 1
    film_rank: int = 0
    embedding: int = 128
    token_embedding: int = 32
    prompt_block: float = 0.8
    token_block: float = 0.07
    competitors: int = 320
    among: float = 0.5
    crossed: int = 1
    other_subjects: int = 1
    relations: int = 48
    scope_weight: float = 1.0
    reach: float = adjustable(default=0.0)
    kept_rank: int = adjustable(default=0)

    def build(self) -> None:
        """Builds the parts of RidgeEdit and the scope's matcher."""
        super().build()
        top = self.lm.first_block(self.names)
        block, token_block = (
            min(top, int(share * len(self.lm.forward.blocks))) for share in (self.prompt_block, self.token_block)
        )
        sizes = (self.embedding, self.token_embedding)
        self.matcher = Matcher(self.lm, *sizes, block, token_block, self.competitors, self.among)
        self.crossing = Crossing(self.crossed, self.other_subjects)

    def upgrade(self, weights: dict[str, Tensor], prefix: str = "") -> bool:
        older = super().upgrade(weights, prefix)
        own = self.matcher.state_dict()
        absent = {f"{prefix}matcher.{name}": torch.full_like(own[name], value) for name, value in ABSENT.items()}
        missing = {name: value for name, value in absent.items() if name not in weights}
        weights.update(missing)
        return older or bool(missing)

    def instructor(self, *args: Any, **options: Any) -> Instructor | None:
        found = super().instructor(*args, **options)
        return found and replace(found, optional=True)

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
        requests, (probes, own, inside) = self._requests(batch)
        loss, right = self.matcher.loss(self._prompts(requests), self._prompts(probes), own, inside)
        self.matcher.remember(self._prompts(batch.requests.tokens))
        if self.relations:
            loss = loss + self._bank_loss("\n".join(record.id for record in batch.records))
        losses["loss"] = losses["loss"] + self.scope_weight * loss
        return losses | {"scope_loss": loss, "scope_accuracy": right}

    def _bank_loss(self, seed: str) -> Tensor:
        """Computes the scope's loss on questions of the bank of relations alone."""
        questions = draw_questions(self.relations, seed)
        ids = self._short([text for question in questions for text, _ in question.asked])
        questions = [one for one in questions if all(text in ids for text, _ in one.asked)]
        if not questions:
            return torch.zeros((), device=self.lm.device)
        asked = [(ids[text], near, i) for i, question in enumerate(questions) for text, near in question.asked]
        requests, probes = (
            PromptStates(self.lm.context, rows_of(rows).to(self.lm.device))
            for rows in ([ids[question.prompt] for question in questions], [row for row, _, _ in asked])
        )
        own = torch.tensor([i for _, _, i in asked], device=self.lm.device)
        near = torch.tensor([near for _, near, _ in asked], device=self.lm.device)
        return self.matcher.loss(requests, probes, own, near, crowded=False)[0]

    def _short(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Returns the token ids of each distinct text, without those that are too long for the LM."""
        different = list(dict.fromkeys(texts))
        found = dict(zip(different, self.lm.text.prompts(different), strict=True)) if different else {}
        return {text: words for text, words in found.items() if len(words) <= self.lm.max_length}

    def _requests(self, batch: EditBatch) -> tuple[TokenBatch, tuple[TokenBatch, Tensor, Tensor]]:
        """Returns the requests that the scope learns from, the batch's own and crossed ones, and their probes.

        Returns:
            The requests, and the probes, which request each belongs to, [probes], and whether it is in its scope, bool
            [probes].
        """
        parts = [batch.in_scope, *([batch.locality] if batch.locality else [])]
        own = torch.cat([part.request_index for part in parts])
        inside = torch.arange(len(own), device=own.device) < len(batch.in_scope.request_index)
        known = TokenBatch.cat(batch.tokens)
        drawn, elsewhere = self.crossing(batch.records)
        texts = [text for one in drawn for text, _ in one.asked] + [text for _, text in elsewhere]
        ids = self._short(texts)
        crossed = [one for one in drawn if all(text in ids for text, _ in one.asked)]
        asked = [(ids[text], near, i) for i, one in enumerate(crossed, len(batch)) for text, near in one.asked]
        asked += [(ids[text], False, record) for record, text in elsewhere if text in ids]
        # The record's request and locality probes ask something else about the same subject, unless they ask just this.
        words = known.prompts().unpadded()
        again = [
            (row, i)
            for i, one in enumerate(crossed, len(batch))
            for row in [one.record, *(~inside & (own == one.record)).nonzero().flatten().tolist()]
            if words[row] != ids[one.prompt]
        ]
        requests, probes = [batch.requests.tokens], [known]
        if crossed:
            requests.append(rows_of([ids[one.prompt] for one in crossed]).to(self.lm.device))
        if asked:
            probes.append(rows_of([row for row, _, _ in asked]).to(self.lm.device))
        if again:
            probes.append(known.select(torch.tensor([row for row, _ in again])))
        own = torch.cat([own, own.new_tensor([i for _, _, i in asked] + [i for _, i in again])])
        near = torch.cat([inside, inside.new_tensor([near for _, near, _ in asked] + [False] * len(again))])
        return TokenBatch.cat(requests), (TokenBatch.cat(probes), own, near)

    def _prompts(self, tokens: TokenBatch) -> PromptStates:
        """Returns the prompts of rows with answers; in training the rows' own states are used, which are known."""
        return PromptStates(self.lm.context, tokens.prompts(), tokens if self.training else None)

    def training_state(self) -> dict[str, Any]:
        """Returns the scope's competitors, and the templates of crossed questions."""
        return {"competitors": self.matcher.memory(), "templates": self.crossing.state()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Takes competitors and templates from a checkpoint."""
        self.matcher.recall(state["competitors"])
        self.crossing.recall(state.get("templates", {}))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups the scope's parameters with the edit rates: they have few steps too, and start as far off."""
        found = super().parameter_groups()
        own = {id(parameter) for parameter in self.matcher.parameters()}
        network = [parameter for parameter in found["network"] if id(parameter) not in own]
        return {"network": network, "edit_rates": [*found["edit_rates"], *self.matcher.parameters()]}
