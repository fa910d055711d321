"""ROME: an edit of one fact as a rank-one update of one MLP (Meng et al. 2022)."""

from __future__ import annotations

from typing import ClassVar

from instructedit.data.batch import RequestBatch
from instructedit.editors.key_value import KeyValueEditor
from instructedit.editors.options import options
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError


@options
class Rome(KeyValueEditor):
    """ROME's rank-one update, by which one layer maps the fact's key k to its value v* (equation 2).

    The new weight is W + Λ (C⁻¹ k)ᵀ with Λ = (v* − W k)/((C⁻¹ k)ᵀ k).

    Defaults: those of Meng et al. for GPT2-XL: block 17 of 48, 20 steps of Adam at 0.5, weight decay 0.5, clamp 4, KL
    0.0625, keys over 20 random contexts. Their covariance is of 100,000 texts of Wikipedia.
    """

    name: ClassVar[str] = "rome"
    PAPER_BLOCKS = ((17,), 48)

    contexts: int = 20

    def build(self) -> None:
        if len(self.sites) != 1:
            raise UserError(f"editor 'rome' edits one layer, got {', '.join(s.name for s in self.sites)}")
        super().build()

    def compute_edit(self, batch: RequestBatch) -> LowRankEdit:
        (site,) = self.sites
        facts = self.facts(batch)
        layer_io = self.at_facts(facts, [site.name])[site.name]
        key, now = layer_io.inputs[facts.plain], layer_io.outputs[facts.plain]
        value = self.values(facts, site, now)
        direction = self.solve(site, self.over_contexts(facts, layer_io.inputs))  # C⁻¹ k of each request, [n, in]
        b = (value - now).double() / (direction * key.double()).sum(-1, keepdim=True)
        return LowRankEdit({site.name: Factors(direction.float().unsqueeze(1), b.float().unsqueeze(1))})
