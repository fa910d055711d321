"""ROME: one fact as a rank-one insertion into one MLP (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from instructedit.data.batch import RequestBatch
from instructedit.editors.key_value import KeyValueEditor
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError


class Rome(KeyValueEditor):
    """W + Λ (C⁻¹ k)ᵀ with Λ = (v* − W k)/((C⁻¹ k)ᵀ k): the edited layer maps the fact's key to its value (equation 2).

    Defaults: GPT2-XL's of Meng et al.: block 17 of 48, 20 steps of Adam at 0.5, weight decay 0.5, clamp 4, KL 0.0625,
    keys over 20 random contexts. Second moments are of 100,000 texts of Wikipedia there.

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
        text: What second moments are of (see `read_texts`): ``tiny``, a file, a hub id. Computed once, then kept on
            disk; ``instructedit covariance`` does so ahead.
        tokens: So many tokens of it.
        fact_token: ``subject_last`` (its last token; for a request without a subject the prompt's), or ``last``.
        seed: Of the random contexts.
        instructions: Put the task's instruction in front of every request.
        blocks: The block, negative from the top; None means as far up as in the paper.
        site_names: Name or pattern of the layer within it; None means the output projection.
    """

    name: ClassVar[str] = "rome"
    PAPER_BLOCKS = ((17,), 48)

    def __init__(
        self,
        steps: int = 20,
        lr: float = 0.5,
        weight_decay: float = 0.5,
        clamp: float = 4.0,
        kl: float = 0.0625,
        stop_below: float = 5e-2,
        contexts: int = 20,
        context_tokens: int = 10,
        text: str = "tiny",
        tokens: int = 100_000,
        fact_token: Literal["subject_last", "last"] = "subject_last",
        seed: int = 0,
        instructions: bool = False,
        blocks: Sequence[int] | None = None,
        site_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            steps, lr, weight_decay, clamp, kl, stop_below, contexts, context_tokens, text, tokens, fact_token, seed,
            instructions, blocks, site_names,
        )  # fmt: skip

    def build(self) -> None:
        if len(self.sites) != 1:
            raise UserError(f"editor 'rome' edits one layer, got {', '.join(s.name for s in self.sites)}")
        self._factors = {}

    def make(self, batch: RequestBatch) -> LowRankEdit:
        (site,) = self.sites
        facts = self.facts(batch)
        seen = self.at_facts(facts, [site.name])[site.name]
        key, now = seen.inputs[facts.plain], seen.outputs[facts.plain]
        value = self.values(facts, site, now)
        direction = self.solve(site, self.over_contexts(facts, seen.inputs))  # C⁻¹ k of each request, [n, in]
        b = (value - now).double() / (direction * key.double()).sum(-1, keepdim=True)
        return LowRankEdit({site.name: Factors(direction.float().unsqueeze(1), b.float().unsqueeze(1))})
