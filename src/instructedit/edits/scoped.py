"""Low-rank changes that hold for prompts in scope alone: what ScopedEdit makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from instructedit.edits.base import as_list, nested
from instructedit.edits.by_prompt import PromptEdit
from instructedit.edits.gates import Gate, MatchGate
from instructedit.edits.low_rank import LowRankEdit
from instructedit.edits.pile import Pile
from instructedit.errors import UserError


@dataclass(frozen=True)
class ScopedEdit(PromptEdit):
    """n edits; a prompt is read with the entry in whose scope it lies, and by the unedited model if it lies in none.

    Entries do not add up: of a thousand that are joined, each prompt is read with one at most.

    Attributes:
        changes: The changes of weights, [n · entries], those of one edit together; of edits that were put together one
            after another, a pile.
        gate: Chooses among them.
    """

    changes: LowRankEdit | Pile
    gate: Gate | MatchGate
    name: ClassVar[str] = "scoped"

    @property
    def sites(self) -> tuple[str, ...]:
        return self.changes.sites

    @property
    def entries(self) -> int:
        return self.gate.keys.shape[1]

    def __len__(self) -> int:
        return len(self.gate.keys)

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        chosen, count = as_list(index, len(self)), self.entries
        changes = self.changes[[i % len(self) * count + entry for i in chosen for entry in range(count)]]
        return type(self)(changes, self.gate.select(chosen))

    def joined(self) -> Self:
        return type(self)(self.changes, self.gate.joined())

    def plus(self, other: Self) -> Self:
        """The entries of both; they are taken to share the gate, but for its keys."""
        if len(self) != len(other) or set(self.sites) != set(other.sites):
            raise UserError(f"{len(self)} edits of {self.sites} and {len(other)} of {other.sites} do not go together")
        changes: LowRankEdit | Pile = Pile.of(self.changes, other.changes)
        if len(self) > 1:
            second = len(self.changes)
            starts = [(i * self.entries, second + i * other.entries) for i in range(len(self))]
            changes = changes[
                [s + k for a, b in starts for s, n in ((a, self.entries), (b, other.entries)) for k in range(n)]
            ]
        return type(self)(changes, self.gate.beside(other.gate))  # type: ignore[arg-type]

    def ungated(self) -> LowRankEdit:
        """The changes of weights of all entries, for every prompt, whatever the gate says."""
        return self.changes.whole() if isinstance(self.changes, Pile) else self.changes

    def contexts(self, chosen: Tensor) -> list[Tensor]:
        return [torch.zeros(0, dtype=torch.long, device=chosen.device)] * len(chosen)

    def reading(self, chosen: Tensor) -> tuple[LowRankEdit, Tensor]:
        if not isinstance(self.changes, Pile):
            return self.changes, chosen
        entries, numbers = chosen.unique(return_inverse=True)
        return self.changes[entries.tolist()], numbers

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        """The output within the scope of the only entry.

        Raises:
            UserError: If there are several: which of them holds depends on the prompt.
        """
        if self.entries != 1:
            raise UserError(f"which of {self.entries} entries holds depends on the prompt")
        return self.ungated().change(site, inputs, outputs, rows)

    def state(self) -> dict[str, Tensor]:
        return {f"changes:{k}": v for k, v in self.ungated().state().items()} | {
            f"gate:{k}": v for k, v in self.gate._asdict().items()
        }

    @property
    def nbytes(self) -> int:
        return self.changes.nbytes + sum(tensor.nbytes for tensor in self.gate)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        read = nested(state, "gate")
        if "tokens" in read:
            whole, token = (read[name].shape[1] for name in ("projection", "token_projection"))
            sizes = {"opening": [whole], "importance": [token], "backward": []}  # saved before there were these
            none = {name: torch.zeros(size) for name, size in sizes.items()}
            gate: Gate | MatchGate = MatchGate(**none | read)
        else:
            gate = Gate(**read)
        changes = LowRankEdit.from_state(nested(state, "changes"))
        if gate.keys.ndim != 3 or gate.keys.shape[0] * gate.keys.shape[1] != len(changes):
            raise UserError(f"{len(changes)} changes do not fit keys {list(gate.keys.shape)}")
        return cls(changes, gate)
