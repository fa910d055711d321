"""What ROME and MEMIT share: a fact is a key at its subject's last token, and a value that makes the model say it."""

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

#: What random contexts open with, as MEMIT's do.
OPENINGS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class VectorEdit(Edit):
    """n vectors, each added to a layer's output at one position: what a value is while it is looked for."""

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
    """Requests as the prompts that ROME and MEMIT look at.

    Attributes:
        tokens: Each request's prompt with its target, first plain, then behind every random context; request by
            request, [n · (1 + contexts), seq].
        at: The fact's position in each row: its subject's last token.
        request_index: Request of each row.
        essence: "<subject> is a" for each request, whose last position shows what the subject is, [n, seq].
        essence_at: The subject's last token in it, [n].
        plain: Numbers of the rows without a context, [n].
    """

    tokens: TokenBatch
    at: Tensor
    request_index: Tensor
    essence: TokenBatch
    essence_at: Tensor
    plain: Tensor


@options
class KeyValueEditor(Editor, ABC):
    """Reads keys and finds values; a subclass says how weights are solved for.

    Args:
        steps: Gradient steps on a value, at most.
        lr: Their learning rate.
        weight_decay: Of a value, by its size against that of what it replaces.
        clamp: A value may be at most so many times the size of what it replaces away from it.
        kl: Weight of keeping what the model says of the subject's nature ("<subject> is a").
        stop_below: A request is done when its loss is below this.
        contexts: Random texts in front of the prompt over which a key is averaged and a value is trained, beside the
            prompt alone.
        context_tokens: Their length.
        text: What second moments are of: ``auto``, text that suits the model (the embedded corpus for the embedded
            models, for any other what it samples itself), ``sampled``, ``tiny``, a file, a hub id (see `read_texts`).
            Computed once, then kept on disk; ``instructedit covariance`` does so ahead.
        tokens: So many tokens of it.
        fact_token: ``subject_last`` (its last token; for a request without a subject the prompt's), or ``last``.
        seed: Of the random contexts.
        blocks: Blocks that are edited, negative from the top; None means as far up as in the paper.
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
        self.text = text_for(self.lm, self.text)  # so that a saved editor says which
        self._prefixes: list[str] | None = None
        self._factors: dict[str, Tensor] = {}

    # -- prompts ------------------------------------------------------------------------------------------------------

    def facts(self, batch: RequestBatch) -> Facts:
        """The prompts that show a request's key and value."""
        if self._prefixes is None:
            self._prefixes = self._random_contexts()
        fronts = ["", *self._prefixes]
        pairs, ends = [], []
        lost = 0
        for request, prompt in zip(batch.requests, batch.prompts, strict=True):
            subject = request.subject or ""
            start = prompt.rfind(subject) if subject and self.fact_token == "subject_last" else -1
            lost += start < 0 and self.fact_token == "subject_last"
            end = start + len(subject) if start >= 0 else len(prompt)
            pairs += [(front + prompt, request.target) for front in fronts]
            ends += [len(front) + end for front in fronts]
        if lost:
            warnings.warn(
                f"editor {self.name!r}: {lost} of {len(batch)} requests name no subject that stands in their prompt; "
                "their fact is taken to be at the prompt's last token",
                stacklevel=2,
            )
        tokens = self.lm.encode(pairs)
        named = [r.subject or p for r, p in zip(batch.requests, batch.prompts, strict=True)]
        essence_pairs = [(f"{name} is a", "thing") for name in named]  # read before the answer, which is of no account
        essence = self.lm.encode(essence_pairs).after_prompts()
        essence_at = self.lm.text.positions(essence_pairs, [len(name) for name in named], essence)
        rows = torch.arange(len(pairs), device=tokens.device)
        return Facts(
            tokens, self.lm.text.positions(pairs, ends, tokens), rows // len(fronts), essence, essence_at,
            rows[:: len(fronts)],
        )  # fmt: skip

    def _random_contexts(self) -> list[str]:
        if not self.contexts:
            return []
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(self.contexts)]
        texts = self.lm.sample(openings, self.context_tokens, [f"{self.seed} {i}" for i in range(self.contexts)])
        return [f"{opening}{' '.join(text.split(chr(10)))}. " for opening, text in zip(openings, texts, strict=True)]

    # -- keys, values, second moments -------------------------------------------------------------------------------

    def at_facts(self, facts: Facts, layers: Sequence[str], edit: Edit | None = None) -> dict[str, LayerIO]:
        """What layers see and give at the fact's position of each row, layer → [rows, in] and [rows, out].

        Args:
            facts: The prompts.
            layers: Names of sites or blocks.
            edit: Applied to the model meanwhile: one edit for each request, or one for all.
        """
        rows = facts.request_index if edit is not None and len(edit) > 1 else None
        where = (torch.arange(len(facts.at), device=facts.at.device), facts.at)
        seen = self.lm.record_activations(facts.tokens, layers, edit, rows)
        return {name: LayerIO(*(t[where].float() for t in found)) for name, found in seen.items()}

    @staticmethod
    def over_contexts(facts: Facts, rows: Tensor) -> Tensor:
        """Mean over each request's contexts, [rows, size] → [n, size]."""
        return rows.view(len(facts.plain), -1, rows.shape[-1]).mean(1)

    def values(self, facts: Facts, site: Site, now: Tensor) -> Tensor:
        """What should stand at each fact so that the model says the target, [n, out] (ROME, equation 4).

        Args:
            facts: The prompts.
            site: The layer to whose output the change is added.
            now: What stands there now at the plain prompts, [n, out]: the layer's output, or the hidden state that it
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
        """C⁻¹ k of each key, [n, in] in double precision, with C = E[k kᵀ] of what the site sees over plain text.

        Raises:
            UserError: If C has no full rank.
        """
        if not self._factors:
            moments = covariances(self.lm, [s.name for s in self.sites], self.text, self.tokens)
            self._factors = {name: self._factor(name, moment) for name, moment in moments.items()}
        return torch.cholesky_solve(keys.double().T, self._factors[site.name]).T

    def _factor(self, name: str, moment: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(moment.to(self.lm.device).double())
        if failed.any():
            raise UserError(
                f"editor {self.name!r}: the second moment of {name} over {self.tokens} tokens of {self.text} has no "
                "full rank; use more tokens, or a text that is more varied"
            )
        return factor
