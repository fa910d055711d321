"""Retrieval: edits are kept as sentences, and the nearest one is prepended to a prompt."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.ike import fact_statement
from instructedit.editors.options import AUTO, options
from instructedit.editors.scales import NEUTRAL_PROMPTS
from instructedit.edits import ContextEdit, Gate
from instructedit.errors import UserError
from instructedit.lm import TokenBatch


@options
class Retrieval(Editor):
    """Shows the model the edit nearest to a prompt, if one is near enough; nothing is trained and no weight changes.

    This is the baseline that critics of editing propose: SERAC's memory (Mitchell et al. 2022b) without its trained
    parts. Joined edits form one memory of any size: each prompt is compared with all of them, and is preceded by
    "New fact: …" of the nearest one, or by nothing.

    A prompt q is in scope of an edit k if ‖P q − P k‖² is below a radius. q and k are the hidden states at the last
    token of the two prompts, halfway up the frozen LM's blocks (see `ContextStates.scope_embedding`). P divides each
    coordinate by its deviation over unrelated prompts, whose median distance² is the unit of the radius, and projects
    at random onto fewer coordinates, which preserves distances to within some per cent (Johnson and Lindenstrauss
    1984), since each edit stores its own.

    Args:
        radius: Distance² below which a prompt is in scope, as a share of the median for unrelated prompts; ``auto``:
            a third of the smallest distance² between these.
        embedding: Number of coordinates stored for an edit.
        seed: Seed of the random projection.
        scope_block: Share of the LM's blocks that lie below the compared hidden states.
    """

    name: ClassVar[str] = "retrieval"
    changes_weights = False
    #: The share of the smallest distance² of unrelated prompts that ``auto`` stands for. On twelve training records
    #: each of CounterFact, ZsRE and Recent, SmolLM2-135M then has three quarters of all rephrasings within the radius,
    #: which is 0.21, and three quarters of all locality probes outside.
    AUTO_RADIUS = 1 / 3

    radius: float | Literal["auto"] = AUTO
    embedding: int = 256
    seed: int = 0
    scope_block: float = 0.5

    def build(self) -> None:
        """Checks the options.

        Raises:
            UserError: If the radius is not above zero, or scope_block is not a share from 0 to below 1.
        """
        if self.radius != AUTO and not self.radius > 0:
            raise UserError(f"editor {self.name!r}: radius must be a number above zero, or auto; got {self.radius}")
        if not 0 <= self.scope_block < 1:
            raise UserError(
                f"editor {self.name!r}: scope_block must be a share from 0 to below 1, got {self.scope_block}"
            )
        self._scope: Gate | None = None

    def compute_edit(self, batch: RequestBatch) -> ContextEdit:
        """Computes a memory of one entry for each request."""
        rows = [self.lm.token_ids(fact_statement(self.lm.text, request)) for request in batch.requests]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).unsqueeze(1)
        lengths = torch.tensor([[len(row)] for row in rows])
        return ContextEdit(ids.to(self.lm.device), lengths.to(self.lm.device), gate=self._gate(batch.tokens))

    def _gate(self, tokens: TokenBatch) -> Gate:
        """Returns the scope of each request, around its own prompt."""
        if self._scope is None:
            self._scope = self._measured()
        keys = self.lm.context.scope_embedding(tokens, int(self._scope.block)).float() @ self._scope.projection.T
        return self._scope._replace(keys=keys.unsqueeze(1))

    def _measured(self) -> Gate:
        """Measures projection, radius and unit on unrelated prompts, as a gate without keys."""
        block = int(self.scope_block * len(self.lm.forward.blocks))
        prompts = self.lm.encode([(prompt, "it") for prompt in NEUTRAL_PROMPTS])
        states = self.lm.context.scope_embedding(prompts, block).float()
        drawn = torch.randn(self.embedding, states.shape[1], generator=torch.Generator().manual_seed(self.seed))
        drawn[:, self.lm.applied.sites.width :] = (
            0  # the mean over all tokens separates rephrasings from neighbours less well
        )
        projection = drawn.to(states) / self.embedding**0.5 / states.std(0).clamp(min=1e-6)
        distances = torch.pdist(states @ projection.T).square()
        unit = distances.median()
        radius = self.AUTO_RADIUS * distances.min() / unit if self.radius == AUTO else unit.new_tensor(self.radius)
        return Gate(states.new_zeros(0), projection, radius, 1 / unit, torch.tensor(block, device=unit.device))
