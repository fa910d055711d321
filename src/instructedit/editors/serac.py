"""SERAC: a memory of edits, a scope classifier and a counterfactual model (Mitchell et al. 2022b)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from instructedit.data.batch import EditBatch, RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.ike import fact_statement
from instructedit.editors.losses import LossWeights, scope_loss
from instructedit.editors.options import options
from instructedit.edits import ContextEdit, Factors, Gate, LowRankEdit
from instructedit.errors import UserError, at_least
from instructedit.lm import TokenBatch


@options
class Serac(Editor):
    """Routes prompts in an edit's scope to a counterfactual model that reads the edit first, all others to the LM.

    The paper's two models are pretrained ones beside the LM (distilBERT; T5-small or a small chat model). Here both are
    derived from the LM, so that nothing needs to be downloaded: the scope classifier is of the paper's embedding kind,
    a learned distance between hidden states of the edit's prompt and of the question; the counterfactual model is the
    LM with a trained low-rank adapter, which reads the edit's text before the prompt.

    Both are trained by `fit`: binary cross-entropy for the scope (a request's in-scope probes against its locality
    probes and all probes of the batch's other requests), and the edit loss of the counterfactual model on in-scope
    probes.

    Args:
        embedding: Size of the classifier's embeddings.
        rank: Rank of the counterfactual model's adapter.
        scope_block: Share of the LM's blocks that lie below the hidden states read by the classifier.
        blocks: Blocks that the adapter changes, negative from the top; None means all.
    """

    name: ClassVar[str] = "serac"
    changes_weights = False
    trainable = True
    EVERY_LAYER = True

    embedding: int = 128
    rank: int = 16
    scope_block: float = 0.5
    blocks: Sequence[int] | None = None

    def build(self) -> None:
        """Builds the adapter's factors (initially no change), and the classifier's projection, scale and bias.

        Raises:
            UserError: If the classifier's embeddings have no size, or scope_block is not a share from 0 to below 1.
        """
        at_least(1, **{f"editor {self.name!r}: embedding": self.embedding})
        if not 0 <= self.scope_block < 1:
            raise UserError(
                f"editor {self.name!r}: scope_block must be a share from 0 to below 1, got {self.scope_block}"
            )
        size = 2 * self.lm.applied.sites.width
        self.inputs = nn.ParameterList(torch.randn(self.rank, s.in_features) * s.in_features**-0.5 for s in self.sites)
        self.outputs = nn.ParameterList(torch.zeros(self.rank, s.out_features) for s in self.sites)
        self.projection = nn.Parameter(torch.randn(self.embedding, size) * size**-0.5)
        self.bias = nn.Parameter(torch.ones(()))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def block(self) -> int:
        """The block whose input the classifier reads."""
        return int(self.scope_block * len(self.lm.forward.blocks))

    def compute_edit(self, batch: RequestBatch) -> ContextEdit:
        """Computes a memory of one entry for each request."""
        rows = [self.lm.token_ids(fact_statement(self.lm.text, request)) for request in batch.requests]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([[len(row)] for row in rows])
        factors = zip(self.sites, self.inputs, self.outputs, strict=True)
        adapter = LowRankEdit({site.name: Factors(a[None], b[None]) for site, a, b in factors})
        device = self.lm.device
        return ContextEdit(ids.unsqueeze(1).to(device), lengths.to(device), adapter, self._gate(batch))

    def _gate(self, batch: RequestBatch) -> Gate:
        keys = self.lm.context.scope_embedding(batch.tokens, self.block) @ self.projection.T
        block = torch.tensor(self.block, device=self.lm.device)
        return Gate(keys.unsqueeze(1), self.projection, self.bias, self.log_scale.exp(), block)

    def training_loss(self, batch: EditBatch, weights: LossWeights) -> dict[str, Tensor]:
        """Computes c_edit · edit loss of the counterfactual model + c_loc · cross-entropy of the classifier."""
        edit = self.compute_edit(batch.requests)
        counterfactual = scope_loss(self.lm, edit.ungated(), batch.in_scope, len(batch), weight=weights.unlikelihood)
        scope, right = self._scope(batch, edit)
        loss = weights.edit * counterfactual + weights.locality * scope
        return {"loss": loss, "edit_loss": counterfactual, "scope_loss": scope, "scope_accuracy": right}

    def _scope(self, batch: EditBatch, edit: ContextEdit) -> tuple[Tensor, Tensor]:
        """Computes cross-entropy and accuracy of separating each request's own in-scope probes from all others.

        The two classes have equal weight. Another request's probes that have the request's own wording are left out.
        """
        gate = edit.joined().gate  # every probe against every request
        assert gate is not None  # set by compute_edit
        probes = [batch.in_scope, *([batch.locality] if batch.locality else [])]
        scope_embeddings = torch.cat([self.lm.context.scope_embedding(part.tokens, self.block) for part in probes])
        request_index = torch.cat([part.request_index for part in probes])
        count = len(scope_embeddings)
        inside = torch.arange(count, device=request_index.device) < len(batch.in_scope.request_index)
        every = torch.arange(len(batch), device=request_index.device)
        logits = gate.logits(scope_embeddings, torch.zeros_like(request_index))  # [probes, requests]
        own = request_index.unsqueeze(-1) == every
        positive = (own & inside.unsqueeze(-1)).float()
        asked = [words for part in probes for words in _wordings(part.tokens)]
        requests = _wordings(batch.requests.tokens)
        same = [[words == request for request in requests] for words in asked]
        known = own | ~torch.tensor(same, device=request_index.device)
        positives, negatives = (positive * known).sum(), ((1 - positive) * known).sum()
        weight = known / torch.where(positive > 0, positives, negatives).clamp(min=1) / 2
        loss = (F.binary_cross_entropy_with_logits(logits, positive, reduction="none") * weight).sum()
        right = (((logits > 0) == (positive > 0)) * weight).sum()
        return loss, right.detach()


def _wordings(tokens: TokenBatch) -> list[list[int]]:
    """Returns the token ids of each row's prompt."""
    return tokens.prompts().unpadded()
