"""Text that the model reads before a prompt: the edits of in-context editing (IKE), retrieval and SERAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.edits.base import as_list, nested
from instructedit.edits.by_prompt import PromptEdit
from instructedit.edits.gates import Gate
from instructedit.edits.low_rank import LowRankEdit
from instructedit.errors import UserError


@dataclass(frozen=True)
class ContextEdit(PromptEdit):
    """n edits as contexts: tokens that are prepended to prompts.

    No layer is changed (unless by `adapter`): the model reads each prompt after its edit's context, wherever prompts
    are known as such (`FrozenLM.logits` and `FrozenLM.generate`).

    Attributes:
        ids: Token ids of the contexts, [n, contexts, tokens].
        lengths: Number of tokens in each without padding, [n, contexts]; 0 where there is none.
        adapter: One change of weights with which the model reads prompts that have a context (SERAC's counterfactual
            model); None leaves the model unchanged.
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

    @property
    def entries(self) -> int:
        return self.ids.shape[1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        chosen = as_list(index, len(self))
        gate = self.gate and self.gate.select(chosen)
        return type(self)(self.ids[chosen], self.lengths[chosen], self.adapter, gate)

    def joined(self) -> Self:
        """Combines all contexts into one edit, whose gate chooses among them; without a gate they are concatenated."""
        if self.gate:
            ids, lengths = self.ids.flatten(0, 1)[None], self.lengths.flatten()[None]
            return type(self)(ids, lengths, self.adapter, self.gate.joined())
        every = torch.cat(self.contexts(torch.arange(len(self))))
        return type(self)(every[None, None], torch.tensor([[len(every)]], device=every.device), self.adapter)

    def plus(self, other: Self) -> Self:
        """Combines the contexts of both, which are assumed to share adapter and gate apart from the gate's keys.

        Raises:
            UserError: If only one of them has a gate, or an adapter.
        """
        if (bool(self.gate), bool(self.adapter)) != (bool(other.gate), bool(other.adapter)):
            raise UserError("contexts of different editors do not go together: only one has a gate, or an adapter")
        width = max(self.ids.shape[2], other.ids.shape[2])
        padded = [F.pad(each.ids, (0, width - each.ids.shape[2])) for each in (self, other)]
        if self.gate and other.gate:
            lengths = torch.cat([self.lengths, other.lengths], 1)
            return type(self)(torch.cat(padded, 1), lengths, self.adapter, self.gate.beside(other.gate))
        return type(self)(torch.cat(padded), torch.cat([self.lengths, other.lengths]), self.adapter).joined()

    def ungated(self) -> Self:
        """Returns the edits without their gate, so that contexts and adapter apply to every prompt."""
        return type(self)(self.ids, self.lengths, self.adapter)

    def contexts(self, chosen: Tensor) -> list[Tensor]:
        """Returns the token ids of the chosen contexts, each [tokens]."""
        ids, lengths = self.ids.flatten(0, 1), self.lengths.flatten().tolist()
        return [ids[i, : lengths[i]] for i in chosen.tolist()]

    def reading(self, chosen: Tensor) -> tuple[LowRankEdit | None, None]:
        return self.adapter, None

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        assert self.adapter is not None  # without an adapter there are no sites
        return self.adapter.change(site, inputs, outputs, None)

    def state(self) -> dict[str, Tensor]:
        state = {"ids": self.ids, "lengths": self.lengths}
        state |= {f"adapter:{k}": v for k, v in self.adapter.state().items()} if self.adapter else {}
        return state | ({f"gate:{k}": v for k, v in self.gate._asdict().items()} if self.gate else {})

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        adapter, gate, ids, lengths = nested(state, "adapter"), nested(state, "gate"), state["ids"], state["lengths"]
        if ids.ndim != 3 or ids.shape[:2] != lengths.shape or not ((lengths >= 0) & (lengths <= ids.shape[2])).all():
            raise UserError(f"contexts {list(ids.shape)} do not fit lengths {lengths.tolist()}")
        return cls(
            ids, lengths, LowRankEdit.from_state(adapter) if adapter else None,
            Gate(**gate) if gate else None,
        )  # fmt: skip
