"""Dense changes of linear layers: the edits of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from instructedit.edits.base import Edit, as_list
from instructedit.edits.low_rank import Factors, LowRankEdit
from instructedit.errors import UserError


@dataclass(frozen=True)
class DenseEdit(Edit):
    """n dense edits: y = W x + ΔW x.

    Selecting edits copies no matrices: the selected ones share the stored matrices.

    Attributes:
        changes: Site → the stored matrices ΔW, [stored, out, in].
        which: Index of each edit's stored matrix, integers [n].
    """

    changes: Mapping[str, Tensor]
    which: Tensor
    name: ClassVar[str] = "dense"
    is_weights = True

    @classmethod
    def of(cls, changes: Mapping[str, Tensor]) -> Self:
        """Builds edits from matrices, site → [n, out, in], in order."""
        first = next(iter(changes.values()))
        return cls(changes, torch.arange(len(first), device=first.device))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.changes)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        return type(self)(self.changes, self.which[as_list(index, len(self))])

    def joined(self) -> Self:
        return type(self).of({site: self.delta(site).sum(0, keepdim=True) for site in self.sites})

    def plus(self, other: Self) -> Self:
        """Adds another value edit by edit; a site may be in only one of the two."""
        sites = dict.fromkeys((*self.sites, *other.sites))
        parts = {site: [edit.delta(site) for edit in (self, other) if site in edit.sites] for site in sites}
        return type(self).of({site: sum(both[1:], start=both[0]) for site, both in parts.items()})

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        stored = self.changes[site].to(inputs.dtype)
        if len(stored) == 1 < len(inputs):  # all rows share the only matrix
            return outputs + inputs @ stored[0].T
        which = (self.which if rows is None else self.which[rows]).expand(len(inputs))
        if len(which) <= len(stored):  # gathering takes no more memory than the stored matrices
            return torch.baddbmm(outputs, inputs, stored[which].mT)
        order = which.argsort(stable=True)
        sizes = which.bincount(minlength=len(stored)).tolist()
        parts = zip(order.split(sizes), stored, strict=True)
        edited = [outputs[mine] + inputs[mine] @ matrix.T for mine, matrix in parts]
        return torch.cat(edited)[order.argsort()]

    def delta(self, site: str) -> Tensor:
        return self.changes[site][self.which]

    def low_rank(self, rank: int) -> LowRankEdit:
        """Computes the best approximation of each edit of at most this rank (Eckart–Young), for a LoRA adapter.

        Raises:
            UserError: If the rank is less than 1.
        """
        if rank < 1:
            raise UserError(f"an edit cannot be compressed to rank {rank}: the least is 1")
        return LowRankEdit({site: _factors(self.delta(site), rank) for site in self.sites})

    def state(self) -> dict[str, Tensor]:
        used, which = self.which.unique(return_inverse=True)  # matrices that were not selected are dropped
        own = self.changes if len(used) == len(next(iter(self.changes.values()))) else None
        changes = own or {site: matrices[used] for site, matrices in self.changes.items()}
        return {f"{site}:delta": matrices for site, matrices in changes.items()} | {"which": which}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        changes = {key.removesuffix(":delta"): value for key, value in state.items() if key != "which"}
        which = state["which"]
        stored = {len(matrices) for matrices in changes.values()}
        fits = which.ndim == 1 and not which.is_floating_point() and len(stored) == 1
        if not fits or any(m.ndim != 3 for m in changes.values()) or not ((which >= 0) & (which < min(stored))).all():
            raise UserError(f"{', '.join(changes)}: {which.tolist()} names no edits of {sorted(stored)} matrices")
        return cls(changes, which)


def _factors(delta: Tensor, rank: int) -> Factors:
    """Computes the factors of the best rank-limited approximation of matrices [n, out, in]."""
    left, size, right = torch.linalg.svd(delta.float(), full_matrices=False)
    b = (left[..., :rank] * size[..., None, :rank]).mT
    return Factors(right[..., :rank, :].to(delta.dtype).contiguous(), b.to(delta.dtype).contiguous())
