"""Edits that change nothing: what the unedited model wears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from instructedit.edits.base import Edit


@dataclass(frozen=True)
class NoEdit(Edit):
    """n edits without a site."""

    count: int
    name: ClassVar[str] = "nothing"

    @property
    def sites(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        if isinstance(index, list):
            return type(self)(len(index))
        chosen = range(self.count)[index]  # an IndexError ends iteration
        return type(self)(1 if isinstance(chosen, int) else len(chosen))

    def joined(self) -> Self:
        return type(self)(1)

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        return outputs

    def delta(self, site: str) -> Tensor:
        raise KeyError(site)

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        return cls(int(state["count"]))
