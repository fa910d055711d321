"""Edits that depend on a prompt as a whole: each holds entries, of which a gate chooses one for a prompt, or none."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from instructedit.edits.base import Edit
from instructedit.edits.low_rank import LowRankEdit

if TYPE_CHECKING:
    from instructedit.edits.match import MatchGate

#: Numbers that a comparison of prompts and keys holds at once, at most (64 MB).
_ROOM = 1 << 24


class Prompts(Protocol):
    """What a gate may read of prompts: hidden states that enter a block of the unedited model, normalised."""

    def __call__(self, block: int) -> Tensor:
        """At the last token, and on average, [prompts, 2 · hidden]."""

    def tokens(self, block: int) -> tuple[Tensor, Tensor]:
        """At each token, [prompts, seq, hidden], and which of them are there, bool [prompts, seq]."""


class Gate(NamedTuple):
    """Which prompts are in scope of which entry: logit = bias − scale · ‖P q − k‖², in scope where it is positive.

    Attributes:
        keys: One for each entry, [n, entries, size].
        projection: P, [size, query].
        bias: Scalar.
        scale: Scalar, positive.
        block: Queries q are made of hidden states that enter this block (`ContextStates.scope_embedding`), scalar.
    """

    keys: Tensor
    projection: Tensor
    bias: Tensor
    scale: Tensor
    block: Tensor

    def logits(self, query: Tensor, rows: Tensor) -> Tensor:
        """For each row its prompt against the entries of its edit, [rows, entries]."""
        gaps = (query @ self.projection.T).unsqueeze(1) - self.keys[rows]
        return self.bias - self.scale * gaps.square().sum(-1)

    def scores(self, prompts: Prompts, rows: Tensor) -> Tensor:
        """The same of prompts that are read now, a part of them at a time."""
        query = prompts(int(self.block)).to(self.projection.dtype)
        size = max(1, _ROOM // self.keys[0].numel())
        return torch.cat([self.logits(*part) for part in zip(query.split(size), rows.split(size), strict=True)])

    def select(self, chosen: list[int]) -> Gate:
        """The keys of the chosen edits."""
        return self._replace(keys=self.keys[chosen])

    def joined(self) -> Gate:
        """All keys as those of one edit."""
        return self._replace(keys=self.keys.flatten(0, 1)[None])

    def beside(self, other: Gate) -> Gate:
        """The keys of both, edit by edit; all else is taken to be the same."""
        return self._replace(keys=torch.cat([self.keys, other.keys], 1))


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

        Args:
            rows: Which edit each row has, [rows].
            prompts: What the gate reads of the rows' prompts.
        """
        first = rows * self.entries
        if self.gate is None:
            return first
        best = self.gate.scores(prompts, rows).flip(-1).max(-1)
        return torch.where(best.values > 0, first + self.entries - 1 - best.indices, -1)
