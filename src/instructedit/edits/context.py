"""Text that the model reads before a prompt: what in-context editing (IKE) and SERAC make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.edits.base import Edit, as_list
from instructedit.edits.low_rank import LowRankEdit
from instructedit.errors import UserError


class Gate(NamedTuple):
    """Which prompts are in scope of which context: logit = bias − scale · ‖P q − k‖², in scope where it is positive.

    Attributes:
        keys: One for each context, [n, contexts, size].
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
        """For each row its prompt against the contexts of its edit, [rows, contexts]."""
        gaps = (query @ self.projection.T).unsqueeze(1) - self.keys[rows]
        return self.bias - self.scale * gaps.square().sum(-1)


@dataclass(frozen=True)
class ContextEdit(Edit):
    """n edits that stand in front of the prompts, as tokens.

    No layer is changed: under one of them the model is shown each prompt behind its context, wherever prompts are known
    as such (`FrozenLM.logits` and `FrozenLM.generate`).

    Attributes:
        ids: Token ids of the contexts, [n, contexts, tokens].
        lengths: Tokens of each that count, [n, contexts]; 0 for none.
        adapter: One change of weights with which the model reads prompts that have a context in front (SERAC's
            counterfactual model); None leaves it as it is.
        gate: Chooses for each prompt one of its edit's contexts or none; without it every prompt gets the only one.
    """

    ids: Tensor
    lengths: Tensor
    adapter: LowRankEdit | None = None
    gate: Gate | None = None
    name: ClassVar[str] = "context"

    @property
    def sites(self) -> tuple[str, ...]:
        return self.adapter.sites if self.adapter else ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        chosen = as_list(index, len(self))
        gate = self.gate and self.gate._replace(keys=self.gate.keys[chosen])
        return type(self)(self.ids[chosen], self.lengths[chosen], self.adapter, gate)

    def joined(self) -> Self:
        """One edit with all contexts: behind a gate the one that fits the prompt, else all, one after the other."""
        if self.gate:
            keys = self.gate.keys.flatten(0, 1)[None]
            return type(self)(
                self.ids.flatten(0, 1)[None], self.lengths.flatten()[None], self.adapter, self.gate._replace(keys=keys)
            )
        every = torch.cat(self.contexts(torch.arange(len(self))))
        return type(self)(every[None, None], torch.tensor([[len(every)]], device=every.device), self.adapter)

    def plus(self, other: Self) -> Self:
        """The contexts of both; they are taken to share adapter and gate, but for the gate's keys."""
        width = max(self.ids.shape[2], other.ids.shape[2])
        padded = [F.pad(each.ids, (0, width - each.ids.shape[2])) for each in (self, other)]
        if self.gate and other.gate:
            gate = self.gate._replace(keys=torch.cat([self.gate.keys, other.gate.keys], 1))
            lengths = torch.cat([self.lengths, other.lengths], 1)
            return type(self)(torch.cat(padded, 1), lengths, self.adapter, gate)
        return type(self)(torch.cat(padded), torch.cat([self.lengths, other.lengths]), self.adapter).joined()

    def ungated(self) -> Self:
        """The same contexts and adapter for every prompt, whatever the gate says."""
        return type(self)(self.ids, self.lengths, self.adapter)

    def choose(self, rows: Tensor, query: Callable[[int], Tensor]) -> Tensor:
        """For each row the number of its context among all [n · contexts], or −1 for none.

        Args:
            rows: Which edit each row has, [rows].
            query: Block → what the gate reads of each row's prompt, [rows, query].
        """
        first = rows * self.ids.shape[1]
        if self.gate is None:
            return first
        logits = self.gate.logits(query(int(self.gate.block)).to(self.gate.projection.dtype), rows)
        best = logits.max(-1)
        return torch.where(best.values > 0, first + best.indices, -1)

    def contexts(self, chosen: Tensor) -> list[Tensor]:
        """The token ids of the chosen contexts, each [tokens]."""
        ids, lengths = self.ids.flatten(0, 1), self.lengths.flatten().tolist()
        return [ids[i, : lengths[i]] for i in chosen.tolist()]

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        assert self.adapter is not None  # else there is no site
        return self.adapter.change(site, inputs, outputs, None)

    def state(self) -> dict[str, Tensor]:
        state = {"ids": self.ids, "lengths": self.lengths}
        state |= {f"adapter:{k}": v for k, v in self.adapter.state().items()} if self.adapter else {}
        return state | ({f"gate:{k}": v for k, v in self.gate._asdict().items()} if self.gate else {})

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}:"): v for k, v in state.items() if k.startswith(f"{name}:")}

        adapter, gate, ids, lengths = part("adapter"), part("gate"), state["ids"], state["lengths"]
        if ids.ndim != 3 or ids.shape[:2] != lengths.shape or not ((lengths >= 0) & (lengths <= ids.shape[2])).all():
            raise UserError(f"contexts {list(ids.shape)} do not fit lengths {lengths.tolist()}")
        return cls(
            ids, lengths, LowRankEdit.from_state(adapter) if adapter else None,
            Gate(**gate) if gate else None,
        )  # fmt: skip
