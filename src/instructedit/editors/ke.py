"""KE, KnowledgeEditor (De Cao et al. 2021): a network reads the edit request and gates its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from instructedit.data.batch import EditBatch, RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.losses import LossWeights
from instructedit.editors.options import options
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import at_least
from instructedit.lm import Site
from instructedit.lm.tokens import rows_of
from instructedit.processes import mean_over_processes


class Gates(nn.Module):
    """A network that maps the condition h to the gates of one site's gradient (KE, equations 6 and 7).

    A weight-normed MLP gives α, β over the inputs, γ, δ over the outputs and η; α̂ = softmax(α) γᵀ and
    β̂ = softmax(β) δᵀ, both of rank 1.

    Args:
        site: The layer whose shape the gates have.
        condition: Size of h.
        hidden: Size of the hidden layer.
    """

    def __init__(self, site: Site, condition: int, hidden: int) -> None:
        super().__init__()
        self.sizes = (site.in_features, site.in_features, site.out_features, site.out_features, 1)
        self.layers = nn.Sequential(
            weight_norm(nn.Linear(condition, hidden)), nn.Tanh(), weight_norm(nn.Linear(hidden, sum(self.sizes)))
        )

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Maps h [n, condition] to softmax(α) and softmax(β) [n, in], γ and δ [n, out], and σ(η) [n, 1]."""
        alpha, beta, gamma, delta, eta = self.layers(condition).split(self.sizes, -1)
        return alpha.softmax(-1), beta.softmax(-1), gamma, delta, eta.sigmoid()


@options
class Ke(Editor):
    """A trained gate on the edit's gradient, ΔW = s·σ(η)·(α̂ ⊙ ∇W + β̂), from a bidirectional LSTM over the request.

    The LSTM reads "<current prediction> >> <target> || <prompt>", in the LM's own embeddings. The update is
    never dense: (a bᵀ) ⊙ Σ_t δ_t u_tᵀ = Σ_t (a ⊙ δ_t)(b ⊙ u_t)ᵀ, so its rank is the number of edit tokens plus one.

    Training is constrained to KL ≤ m: the multiplier is updated by gradient ascent, and the margin m is annealed
    whenever validation succeeds.

    Defaults: De Cao et al.'s code (LSTM of 2 × 128, condition 1024, hidden 128, s = 1, multiplier's rate 0.1, m from
    1e-3 by 0.8 down to 1e-5). It edits all matrices of its model; the default here is the MLPs of the last three
    blocks, as for MEND.

    Args:
        lstm: Size of each direction of the LSTM.
        condition: Size of h.
        hidden: Size of the hidden layer of the gates.
        scale: s, by which every update is multiplied.
        margin: Initial margin m, the largest KL that is allowed.
        margin_decay: Factor by which m is multiplied after a successful validation.
        margin_min: Smallest margin, at which the annealing ends.
        success: Share that Reliability must exceed for a validation to succeed.
        multiplier_rate: Learning rate of the multiplier of the constraint.
    """

    name: ClassVar[str] = "ke"
    trainable = True

    lstm: int = 128
    condition: int = 1024
    hidden: int = 128
    scale: float = 1.0
    margin: float = 1e-3
    margin_decay: float = 0.8
    margin_min: float = 1e-5
    success: float = 0.9
    multiplier_rate: float = 0.1

    def build(self) -> None:
        """Builds an LSTM over the LM's embeddings, and gates for each site.

        Raises:
            UserError: If the LSTM or the hidden layer has no units.
        """
        sizes = {"lstm": self.lstm, "hidden": self.hidden}
        at_least(1, **{f"editor {self.name!r}: {option}": units for option, units in sizes.items()})
        size = self.lm.model.get_input_embeddings().weight.shape[-1]
        self.reader = nn.LSTM(size, self.lstm, batch_first=True, bidirectional=True)
        self.summary = nn.Linear(2 * self.lstm, self.condition)
        self.gates = nn.ModuleList(Gates(site, self.condition, self.hidden) for site in self.sites)
        self.multiplier: Tensor
        self.allowed: Tensor
        self.register_buffer("multiplier", torch.ones(()))
        self.register_buffer("allowed", torch.tensor(self.margin))

    def compute_edit(self, batch: RequestBatch) -> LowRankEdit:
        names = [site.name for site in self.sites]
        captured = self.lm.capture(batch.tokens, names)
        predictions = self.lm.tokenizer.batch_decode(captured.predicted.split(batch.tokens.answer_sizes()))
        condition = self._encode(batch, predictions)
        factors: dict[str, Factors] = {}
        for name, gates in zip(names, self.gates, strict=True):
            alpha, beta, gamma, delta, eta = gates(condition)
            a = torch.cat([alpha.unsqueeze(1) * captured.u[name].float(), beta.unsqueeze(1)], 1)
            b = torch.cat([gamma.unsqueeze(1) * captured.delta[name].float(), delta.unsqueeze(1)], 1)
            factors[name] = Factors(a, self.scale * eta.unsqueeze(1) * b)
        return LowRankEdit(factors)

    def _encode(self, batch: RequestBatch, predictions: list[str]) -> Tensor:
        """Encodes the requests and the model's current predictions as the condition h, [n, condition]."""
        texts = [
            f"{old.strip()} >> {request.target} || {prompt}"
            for old, request, prompt in zip(predictions, batch.requests, batch.prompts, strict=True)
        ]
        rows = rows_of([self.lm.text.document(text)[-self.lm.max_length :] for text in texts]).to(self.lm.device)
        embedded = self.lm.model.get_input_embeddings()(rows.inputs["input_ids"]).float()
        packed = pack_padded_sequence(embedded, torch.tensor(rows.lengths), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.reader(packed)  # [directions, n, lstm]
        return self.summary(torch.cat([last[0], last[1]], -1)).tanh()

    def training_loss(self, batch: EditBatch, weights: LossWeights) -> dict[str, Tensor]:
        """Computes c_edit · L_e + λ · (KL − m), without c_loc; λ by gradient ascent (De Cao et al., section 3.2)."""
        edit, locality = self.editing_loss(batch, weights)
        loss = weights.edit * edit + self.multiplier * (locality - self.allowed)
        excess = mean_over_processes(locality.detach() - self.allowed)
        self.multiplier = (self.multiplier + self.multiplier_rate * excess).clamp(min=0)
        return {"loss": loss, "edit_loss": edit, "locality_loss": locality, "multiplier": self.multiplier}

    def on_validation_end(self, scores: Mapping[str, float]) -> None:
        if scores.get("reliability", 0.0) > 100 * self.success:
            self.allowed.mul_(self.margin_decay).clamp_(min=self.margin_min)
