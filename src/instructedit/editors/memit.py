"""MEMIT: edits of many facts at once, spread over the MLPs of several blocks (Meng et al. 2023)."""

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
from instructedit.errors import UserError
from instructedit.lm import Site


@options
class SpreadEditor(KeyValueEditor, ABC):
    """Base of methods that spread ΔW = R Kᵀ (M + K Kᵀ)⁻¹ over several blocks from the bottom up; subclasses define M.

    R is the remaining difference to each fact's value at the last of the blocks, divided evenly among the remaining
    blocks. n separate edits have one fact each, so that K is one column; ``editor.edit(requests, together=True)``
    solves for all requests at once, which is the purpose of such a method.
    """

    @abstractmethod
    def inverse(self, site: Site, keys: Tensor) -> Tensor:
        """Computes M⁻¹ k for each key, [n, in] in double precision, where M weights what the layer must preserve."""

    def build(self) -> None:
        """Checks that the update of every layer adds to the hidden state, where the facts' values are.

        Raises:
            UserError: If a layer is not the output projection of its block's MLP.
        """
        if inner := [site.name for site in self.sites if not site.output]:
            raise UserError(f"editor {self.name!r} edits the output projections of MLPs, got {', '.join(inner)}")
        super().build()

    def compute_edit(self, batch: RequestBatch) -> LowRankEdit:
        return self.spread(batch, self.inverse, together=False)

    def compute_joint_edit(self, batch: RequestBatch) -> LowRankEdit:
        """Computes one edit with all n facts, of rank n in each block."""
        return self.spread(batch, self.inverse, together=True)

    def spread(self, batch: RequestBatch, inverse: Callable[[Site, Tensor], Tensor], together: bool) -> LowRankEdit:
        """Computes the update of each block in turn, with the updates of earlier blocks applied.

        Args:
            batch: The requests.
            inverse: Computes M⁻¹ k for each key, see `inverse`.
            together: Compute one edit for all requests, instead of one for each.
        """
        facts, last = self.facts(batch), self.sites[-1]
        top = self.lm.forward.block_name(last.block)
        hidden = self.at_facts(facts, [top])[top].outputs[facts.plain]
        target = self.values(facts, last, hidden)
        done: dict[str, Factors] = {}
        for left, site in zip(range(len(self.sites), 0, -1), self.sites, strict=True):
            layer_io = self.at_facts(facts, [site.name, top], LowRankEdit(done) if done else None)
            keys = self.over_contexts(facts, layer_io[site.name].inputs)
            missing = (target - layer_io[top].outputs[facts.plain]) / left
            a = (_all_keys if together else _single_keys)(keys.double(), inverse(site, keys)).float()
            done[site.name] = Factors(a, missing[None] if together else missing.unsqueeze(1))
        return LowRankEdit(done)


def _single_keys(keys: Tensor, solved: Tensor) -> Tensor:
    """Computes Kᵀ (M + K Kᵀ)⁻¹ = kᵀ M⁻¹ / (1 + kᵀ M⁻¹ k) for a K of one key each, [n, 1, in]."""
    return (solved / (1 + (solved * keys).sum(-1, keepdim=True))).unsqueeze(1)


def _all_keys(keys: Tensor, solved: Tensor) -> Tensor:
    """Computes Kᵀ (M + K Kᵀ)⁻¹ = (1 + Kᵀ M⁻¹ K)⁻¹ Kᵀ M⁻¹ for all keys, [1, n, in], from an n × n system."""
    return ridge(keys, solved, solved)[None]


@options
class Memit(SpreadEditor):
    """MEMIT: ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹ in each of several blocks from the bottom up (equation 14).

    Defaults: those of Meng et al. for GPT2-XL: blocks 13 to 17 of 48, λ = 20,000, 20 steps of Adam at 0.5, weight
    decay 0.5, clamp 0.75, KL 0.0625.

    Args:
        moment_weight: λ, the weight of the layers' inputs over plain text relative to the facts.
    """

    name: ClassVar[str] = "memit"
    PAPER_BLOCKS = ((13, 14, 15, 16, 17), 48)

    moment_weight: float = 20_000.0
    clamp: float = 0.75

    def inverse(self, site: Site, keys: Tensor) -> Tensor:
        return self.solve(site, keys) / self.moment_weight
