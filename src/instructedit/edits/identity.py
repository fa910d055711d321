"""Edits that change nothing, for the unedited model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from instructedit.edits.base import Edit, as_list


@dataclass(frozen=True)
class IdentityEdit(Edit):
    """n edits without any site, which change nothing."""

    count: int
    name: ClassVar[str] = "identity"
    is_weights = True

    @property
    def is_identity(self) -> bool:
        return True

    @property
    def sites(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        return type(self)(len(as_list(index, self.count)))

    def joined(self) -> Self:
        return type(self)(1)

    def plus(self, other: Self) -> Self:
        return type(self)(1)

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        return outputs

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        return cls(int(state["count"]))
