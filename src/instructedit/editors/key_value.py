"""The base of ROME and MEMIT: a fact is a key at its subject's last token and a value that makes the model say it."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.optimisation import Values, optimise
from instructedit.editors.options import options
from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm import LayerIO, Site, TokenBatch
from instructedit.lm.covariance import covariances
from instructedit.lm.own_text import text_for
from instructedit.metrics import row_mean
from instructedit.rows import take_rows

#: Opening words of random contexts, as in MEMIT.
OPENINGS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class VectorEdit(Edit):
    """n vectors, each added to a layer's output at one position while the value there is being optimised."""

    site: str
    vectors: Tensor  # [n, out]
    positions: Tensor  # [n]
    positionwise = False

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int | slice | list[int]) -> VectorEdit:
        raise NotImplementedError

    def joined(self) -> VectorEdit:
        raise NotImplementedError

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        index = torch.arange(len(outputs), device=outputs.device)
        which = index if rows is None else rows
        where = (index, self.positions[which])
        return outputs.index_put(where, take_rows(self.vectors, which).to(outputs.dtype), accumulate=True)

    def state(self) -> dict[str, Tensor]:
        raise NotImplementedError

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> VectorEdit:
        raise NotImplementedError


@dataclass(frozen=True)
class Facts:
    """The prompts of requests from which ROME and MEMIT compute keys and values.

    Attributes:
        tokens: Each request's prompt with its target, first plain, then after every random context; grouped by
            request, [n · (1 + contexts), seq].
        at: The fact's position in each row: its subject's last token.
        request_index: Index of each row's request.
        essence: "<subject> is a" for each request, whose last position shows what the subject is, [n, seq].
        essence_at: Position of the subject's last token in `essence`, [n].
        plain: Indices of the rows without a context, [n].
    """

    tokens: TokenBatch
    at: Tensor
    request_index: Tensor
    essence: TokenBatch
    essence_at: Tensor
    plain: Tensor


@options
class KeyValueEditor(Editor, ABC):
    """Base of methods that store facts as keys and values; a subclass solves for the weights.

    Args:
        steps: Largest number of gradient steps on a value.
        lr: Learning rate.
        weight_decay: Weight decay of a value's change, relative to the size of the value that it replaces.
        clamp: Largest change of a value, in multiples of the size of the value that it replaces.
        kl: Weight of preserving the model's predictions about the subject's nature ("<subject> is a").
        stop_below: A request is finished when its loss falls below this.
        contexts: Number of random texts before the prompt over which a key is averaged and a value is trained, in
            addition to the prompt alone.
        context_tokens: Length of these texts in tokens.
        text: Text for the covariance: ``auto``, text that suits the model (the embedded corpus for the embedded
            models, for any other text sampled from it), ``sampled``, ``tiny``, a file, a hub id (see `read_texts`).
            Computed once, then kept on disk; ``instructedit covariance`` does so in advance.
        tokens: Number of tokens of this text.
        fact_token: ``subject_last`` (its last token; for a request without a subject the prompt's), or ``last``.
        seed: Seed of the random contexts.
        blocks: Blocks that are edited, negative from the top; None means the paper's, scaled to the model's depth.
    """

    OUTPUT_SITES = True
    REMEDY = "a larger lr or clamp, more steps, or other blocks"

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl: float = 0.0625
    stop_below: float = 5e-2
    contexts: int = 5
    context_tokens: int = 10
    text: str = "auto"
    tokens: int = 100_000
    fact_token: Literal["subject_last", "last"] = "subject_last"
    seed: int = 0
    blocks: Sequence[int] | None = None

    def build(self) -> None:
        self.text = text_for(self.lm, self.text)  # so that a saved editor records which text
        self._prefixes: list[str] | None = None
        self._factors: dict[str, Tensor] = {}

    # -- prompts ------------------------------------------------------------------------------------------------------

    def facts(self, batch: RequestBatch) -> Facts:
        """Builds the prompts from which the requests' keys and values are computed."""
        if self._prefixes is None:
            self._prefixes = self._random_contexts()
        prompt_prefixes = ["", *self._prefixes]
        pairs, ends = [], []
        lost = 0
        for request, prompt in zip(batch.requests, batch.prompts, strict=True):
            subject = request.subject or ""
            start = prompt.rfind(subject) if subject and self.fact_token == "subject_last" else -1
            lost += start < 0 and self.fact_token == "subject_last"
            end = start + len(subject) if start >= 0 else len(prompt)
            pairs += [(prefix + prompt, request.target) for prefix in prompt_prefixes]
            ends += [len(prefix) + end for prefix in prompt_prefixes]
        if lost:
            warnings.warn(
                f"editor {self.name!r}: {lost} of {len(batch)} requests name no subject that stands in their prompt; "
                "their fact is taken to be at the prompt's last token",
                stacklevel=2,
            )
        tokens = self.lm.encode(pairs)
        named = [r.subject or p for r, p in zip(batch.requests, batch.prompts, strict=True)]
        essence_pairs = [(f"{name} is a", "thing") for name in named]  # scored before the answer, which does not matter
        essence = self.lm.encode(essence_pairs).after_prompts()
        essence_at = self.lm.text.positions(essence_pairs, [len(name) for name in named], essence)
        rows = torch.arange(len(pairs), device=tokens.device)
        return Facts(
            tokens, self.lm.text.positions(pairs, ends, tokens), rows // len(prompt_prefixes), essence,
            essence_at, rows[:: len(prompt_prefixes)],
        )  # fmt: skip

    def _random_contexts(self) -> list[str]:
        if not self.contexts:
            return []
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(self.contexts)]
        seeds = [f"{self.seed} {i}" for i in range(self.contexts)]
        with self.lm.applied.suspended():
            texts = self.lm.sample(openings, self.context_tokens, seeds)
        return [f"{opening}{' '.join(text.split(chr(10)))}. " for opening, text in zip(openings, texts, strict=True)]

    # -- keys, values, covariances -------------------------------------------------------------------------------

    def at_facts(self, facts: Facts, layers: Sequence[str], edit: Edit | None = None) -> dict[str, LayerIO]:
        """Records layers' inputs and outputs at each row's fact position, layer → [rows, in] and [rows, out].

        Args:
            facts: The prompts.
            layers: Names of sites or blocks.
            edit: Edits applied to the model: one for each request, or one for all.
        """
        rows = facts.request_index if edit is not None and len(edit) > 1 else None
        where = (torch.arange(len(facts.at), device=facts.at.device), facts.at)
        layer_io = self.lm.record_activations(facts.tokens, layers, edit, rows)
        return {name: LayerIO(*(t[where].float() for t in found)) for name, found in layer_io.items()}

    @staticmethod
    def over_contexts(facts: Facts, rows: Tensor) -> Tensor:
        """Averages over each request's contexts, [rows, size] → [n, size]."""
        return rows.view(len(facts.plain), -1, rows.shape[-1]).mean(1)

    def values(self, facts: Facts, site: Site, now: Tensor) -> Tensor:
        """Optimises the vector at each fact's position to make the model predict the target, [n, out] (ROME, eq. 4).

        Args:
            facts: The prompts.
            site: The layer to whose output the change is added.
            now: The current vector there in plain prompts, [n, out]: the layer's output, or the hidden state that it
                is added to (both change by the same vector). Bounds and decay are relative to its size.
        """
        norms = now.norm(dim=-1)
        with torch.no_grad():
            before = self.lm.logits(facts.essence, start=site.block).float().log_softmax(-1)

        def losses(values: Values, active: Tensor) -> Tensor:
            delta = values["delta"]
            rows = (facts.request_index.unsqueeze(-1) == active).any(-1).nonzero().squeeze(-1)
            order = torch.searchsorted(active, facts.request_index[rows])
            applied = VectorEdit(site.name, take_rows(delta, order), facts.at[rows])
            nll = self.lm.losses(facts.tokens.select(rows), applied)
            edit = row_mean(nll, order, len(active))
            essence = VectorEdit(site.name, delta, facts.essence_at[active])
            after = self.lm.logits(facts.essence.select(active), essence).float().log_softmax(-1)
            drift = F.kl_div(before[active], after, log_target=True, reduction="none").sum(-1)  # KL(edited ‖ unedited)
            decay = self.weight_decay * delta.norm(dim=-1) / norms[active].square()
            return edit + self.kl * drift + decay

        def project(values: Values, request: int) -> None:
            size, most = values["delta"].norm(), self.clamp * norms[request]
            if size > most:
                values["delta"].mul_(most / size)

        start = {"delta": torch.zeros_like(now)}
        found = optimise(start, losses, self.steps, self.lr, stop_below=self.stop_below, project=project)
        return now + found["delta"]

    def solve(self, site: Site, keys: Tensor) -> Tensor:
        """Computes C⁻¹ k for each key, [n, in] in double precision; C = E[k kᵀ] of the site's inputs over plain text.

        Raises:
            UserError: If C does not have full rank.
        """
        if not self._factors:
            matrices = covariances(self.lm, [s.name for s in self.sites], self.text, self.tokens)
            self._factors = {name: self._factor(name, covariance) for name, covariance in matrices.items()}
        return torch.cholesky_solve(keys.double().T, self._factors[site.name]).T

    def _factor(self, name: str, covariance: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(covariance.to(self.lm.device).double())
        if failed.any():
            raise UserError(
                f"editor {self.name!r}: the covariance of {name} over {self.tokens} tokens of {self.text} has no "
                "full rank; use more tokens, or a text that is more varied"
            )
        return factor
