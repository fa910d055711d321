"""MEMIT: many facts at once, spread over several MLPs (Meng et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from instructedit.data.batch import RequestBatch
from instructedit.editors.key_value import KeyValueEditor
from instructedit.editors.options import options
from instructedit.edits import Factors, LowRankEdit


@options
class Memit(KeyValueEditor):
    """ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹ in each of several blocks from the bottom up (equation 14).

    R is what is still missing of each fact's value at the last of the blocks, shared out evenly over the blocks left.
    n separate edits have one fact each, so that K is one column; ``editor.edit(requests, together=True)`` solves for
    all requests at once, which is what the method is for.

    Defaults: GPT2-XL's of Meng et al.: blocks 13 to 17 of 48, λ = 20,000, 20 steps of Adam at 0.5, weight decay 0.5,
    clamp 0.75, KL 0.0625.

    Args:
        moment_weight: λ, how much what the layers see over plain text weighs beside the facts.
    """

    name: ClassVar[str] = "memit"
    PAPER_BLOCKS = ((13, 14, 15, 16, 17), 48)

    moment_weight: float = 20_000.0
    clamp: float = 0.75

    def compute_edit(self, batch: RequestBatch) -> LowRankEdit:
        def column(keys: Tensor, solved: Tensor) -> Tensor:
            # Kᵀ (λC + K Kᵀ)⁻¹ for one key: kᵀ (λC)⁻¹ / (1 + kᵀ (λC)⁻¹ k)
            return (solved / (1 + (solved * keys).sum(-1, keepdim=True))).unsqueeze(1)

        return self._spread(batch, column, lambda missing: missing.unsqueeze(1))

    def compute_joint_edit(self, batch: RequestBatch) -> LowRankEdit:
        """One edit of rank n in each block that holds all facts."""

        def columns(keys: Tensor, solved: Tensor) -> Tensor:
            # Kᵀ (λC + K Kᵀ)⁻¹ = (1 + Kᵀ (λC)⁻¹ K)⁻¹ Kᵀ (λC)⁻¹: n × n, not in × in
            return torch.linalg.solve(torch.eye(len(keys)).to(keys) + keys @ solved.T, solved)[None]

        return self._spread(batch, columns, lambda missing: missing[None])

    def _spread(
        self, batch: RequestBatch, inputs: Callable[[Tensor, Tensor], Tensor], outputs: Callable[[Tensor], Tensor]
    ) -> LowRankEdit:
        """The update of each block in turn, seen by the blocks after it.

        Args:
            batch: The requests.
            inputs: From the keys and (λC)⁻¹ of them, both [n, in], the factors a, [edits, rank, in].
            outputs: From what is missing of each fact, [n, out], the factors b, [edits, rank, out].
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
            a = inputs(keys.double(), self.solve(site, keys) / self.moment_weight)
            done[site.name] = Factors(a.float(), outputs(missing))
        return LowRankEdit(done)
