"""Edits that depend on a prompt as a whole: each holds entries, of which a gate chooses one for a prompt, or none."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from instructedit.edits.base import Edit
from instructedit.edits.gates import Gate, MatchGate, Prompts
from instructedit.edits.low_rank import LowRankEdit

#: Scores that differ by no more are equal: the products of equal entries may be rounded differently.
ROUNDING = 1e-4


class PromptEdit(Edit):
    """n edits that are applied to prompts known as such (`FrozenLM.logits` and `FrozenLM.generate`).

    Attributes:
        gate: Chooses for each prompt one of its edit's entries or none; without it every prompt gets the only one.
    """

    gate: Gate | MatchGate | None

    @property
    @abstractmethod
    def entries(self) -> int:
        """How many entries each edit has."""

    @abstractmethod
    def contexts(self, chosen: Tensor) -> list[Tensor]:
        """The token ids, each [tokens], that prompts of the chosen entries stand behind."""

    @abstractmethod
    def reading(self, chosen: Tensor) -> tuple[LowRankEdit | None, Tensor | None]:
        """The change of weights with which prompts of the chosen entries are read, and which of its edits each has."""

    def choose(self, rows: Tensor, prompts: Prompts) -> Tensor:
        """For each row the number of its entry among all [n · entries], or −1 for none; of equals the latest.

        Equals are scores that differ by rounding: the scores of two equal entries may.

        Args:
            rows: Which edit each row has, [rows].
            prompts: What the gate reads of the rows' prompts.
        """
        first = rows * self.entries
        if self.gate is None:
            return first
        scores = self.gate.scores(prompts, rows)
        best = scores.max(-1, keepdim=True).values
        behind = (scores >= best - ROUNDING).flip(-1).int().argmax(-1)  # the first from the end
        return torch.where(best.squeeze(-1) > 0, first + self.entries - 1 - behind, -1)
