"""MEMIT: many facts at once, spread over several MLPs (Meng et al. 2023)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from instructedit.data.batch import RequestBatch
from instructedit.editors.key_value import KeyValueEditor
from instructedit.editors.options import options
from instructedit.editors.ridge import ridge
from instructedit.edits import Factors, LowRankEdit
from instructedit.lm import Site


@options
class SpreadEditor(KeyValueEditor, ABC):
    """Makes ΔW = R Kᵀ (M + K Kᵀ)⁻¹ in each of several blocks from the bottom up; a subclass says what M is.

    R is what is still missing of each fact's value at the last of the blocks, shared out evenly over the blocks left.
    n separate edits have one fact each, so that K is one column; ``editor.edit(requests, together=True)`` solves for
    all requests at once, which is what such a method is for.
    """

    @abstractmethod
    def inverse(self, site: Site, keys: Tensor) -> Tensor:
        """M⁻¹ k of each key, [n, in] in double precision, where M weighs what the layer must go on doing."""

    def compute_edit(self, batch: RequestBatch) -> LowRankEdit:
        return self.spread(batch, self.inverse, together=False)

    def compute_joint_edit(self, batch: RequestBatch) -> LowRankEdit:
        """One edit of rank n in each block that holds all facts."""
        return self.spread(batch, self.inverse, together=True)

    def spread(self, batch: RequestBatch, inverse: Callable[[Site, Tensor], Tensor], together: bool) -> LowRankEdit:
        """The update of each block in turn, seen by the blocks after it.

        Args:
            batch: The requests.
            inverse: Gives M⁻¹ k of each key, see `inverse`.
            together: Solve for all requests at once, instead of an edit for each.
        """
        facts, last = self.facts(batch), self.sites[-1]
        top = self.lm.forward.block_name(last.block)
        hidden = self.at_facts(facts, [top])[top].outputs[facts.plain]
        wanted = self.values(facts, last, hidden)
        done: dict[str, Factors] = {}
        for left, site in zip(range(len(self.sites), 0, -1), self.sites, strict=True):
            seen = self.at_facts(facts, [site.name, top], LowRankEdit(done) if done else None)
            keys = self.over_contexts(facts, seen[site.name].inputs)
            missing = (wanted - seen[top].outputs[facts.plain]) / left
            a = (_all_keys if together else _single_keys)(keys.double(), inverse(site, keys)).float()
            done[site.name] = Factors(a, missing[None] if together else missing.unsqueeze(1))
        return LowRankEdit(done)


def _single_keys(keys: Tensor, solved: Tensor) -> Tensor:
    """Kᵀ (M + K Kᵀ)⁻¹ = kᵀ M⁻¹ / (1 + kᵀ M⁻¹ k) where K is one key, [n, 1, in]."""
    return (solved / (1 + (solved * keys).sum(-1, keepdim=True))).unsqueeze(1)


def _all_keys(keys: Tensor, solved: Tensor) -> Tensor:
    """Kᵀ (M + K Kᵀ)⁻¹ = (1 + Kᵀ M⁻¹ K)⁻¹ Kᵀ M⁻¹ for all keys at once, [1, n, in]: n × n, not in × in."""
    return ridge(keys, solved, solved)[None]


@options
class Memit(SpreadEditor):
    """ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹ in each of several blocks from the bottom up (equation 14).

    Defaults: GPT2-XL's of Meng et al.: blocks 13 to 17 of 48, λ = 20,000, 20 steps of Adam at 0.5, weight decay 0.5,
    clamp 0.75, KL 0.0625.

    Args:
        moment_weight: λ, how much what the layers see over plain text weighs beside the facts.
    """

    name: ClassVar[str] = "memit"
    PAPER_BLOCKS = ((13, 14, 15, 16, 17), 48)

    moment_weight: float = 20_000.0
    clamp: float = 0.75

    def inverse(self, site: Site, keys: Tensor) -> Tensor:
        return self.solve(site, keys) / self.moment_weight
