"""Low-rank changes of linear layers: the edits of MEND, InstructEdit, KE, ROME, MEMIT and others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from instructedit.edits.base import ADAPTER, Edit, as_list, pad_to, product_dtype
from instructedit.errors import UserError
from instructedit.rows import take_rows


class Factors(NamedTuple):
    """Factors of changes ΔW = Σ_t b_t a_tᵀ: `a` [n, rank, in], `b` [n, rank, out]; rows of zeros are padding."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class LowRankEdit(Edit):
    """n low-rank edits, y = W x + Σ_t b_t (a_tᵀ x), where each row of a batch has its own factors.

    Attributes:
        factors: Site → its factors. All sites hold the same number of edits; the rank may differ.
    """

    factors: Mapping[str, Factors]
    name: ClassVar[str] = "low_rank"
    is_weights = True

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.factors)

    def __len__(self) -> int:
        return next(iter(self.factors.values())).a.shape[0]

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        chosen = torch.tensor(as_list(index, len(self)), dtype=torch.long)
        parts = {site: (take_rows(part, chosen.to(part.device)) for part in f) for site, f in self.factors.items()}
        return type(self)({site: Factors(*both) for site, both in parts.items()})

    def joined(self) -> Self:
        return type(self)(
            {site: Factors(f.a.flatten(0, 1)[None], f.b.flatten(0, 1)[None]) for site, f in self.factors.items()}
        )

    def plus(self, other: Self) -> Self:
        """Adds another value edit by edit; a site may be in only one of the two."""
        sites = dict.fromkeys((*self.sites, *other.sites))
        parts = {site: [edit.factors[site] for edit in (self, other) if site in edit.sites] for site in sites}
        return type(self)({site: Factors(*map(_rows, zip(*both, strict=True))) for site, both in parts.items()})

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        kind = product_dtype(inputs.dtype)
        a, b = (f.to(kind) for f in self.factors[site])
        inputs = inputs.to(kind)
        if len(self) == 1:
            return (outputs + inputs @ a[0].T @ b[0]).to(outputs.dtype)
        if rows is not None:
            a, b = take_rows(a, rows), take_rows(b, rows)
        return torch.baddbmm(outputs.to(kind), torch.bmm(inputs, a.mT), b).to(outputs.dtype)

    def delta(self, site: str) -> Tensor:
        a, b = self.factors[site]
        return b.mT @ a

    def compressed(self, rank: int) -> Self:
        """Computes the best approximation of each edit of at most this rank (Eckart–Young), from small matrices.

        Raises:
            UserError: If the rank is less than 1.
        """
        if rank < 1:
            raise UserError(f"an edit cannot be compressed to rank {rank}: the least is 1")
        return type(self)({site: _truncated(f, rank) for site, f in self.factors.items()})

    def unpadded(self) -> Self:
        """Removes the padding, rows of zeros, that all of the edits share."""
        return type(self)({site: _unpadded(f) for site, f in self.factors.items()})

    def state(self) -> dict[str, Tensor]:
        return {f"{site}:{part}": getattr(f, part) for site, f in self.factors.items() for part in ("a", "b")}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        sites = dict.fromkeys(key.rsplit(":", 1)[0] for key in state)
        factors = {site: Factors(state[f"{site}:a"], state[f"{site}:b"]) for site in sites}
        for site, (a, b) in factors.items():
            first = next(iter(factors.values())).a
            if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != b.shape[:2] or len(a) != len(first):
                raise UserError(f"{site}: factors {list(a.shape)} and {list(b.shape)} make no edit")
        return cls(factors)

    def save_pretrained(self, folder: str | Path, **meta: str) -> None:
        """Writes the edits; a single edit also as a LoRA adapter that `peft` and servers based on it can load.

        To write n edits as one adapter, join them: ``edit.joined().save_pretrained(folder)``.
        """
        edit = self.unpadded()
        super(LowRankEdit, edit).save_pretrained(folder, **meta)
        if len(edit) == 1:
            _save_lora(edit, Path(folder), meta.get("base_model", ""))


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1)


def stack(edits: list[LowRankEdit]) -> LowRankEdit:
    """Stacks the given edits into one value that holds them all, in order."""
    parts = {site: [e.factors[site] for e in edits] for site in edits[0].sites}

    def joined(site: str, part: int) -> Tensor:
        rank = max(f.a.shape[1] for f in parts[site])
        return torch.cat([pad_to(f[part], rank, 1) for f in parts[site]])

    return LowRankEdit({site: Factors(joined(site, 0), joined(site, 1)) for site in parts})


def _unpadded(factors: Factors) -> Factors:
    """Keeps the rows that are nonzero in at least one of the edits; one row of zeros if there are none."""
    real = (factors.a.any(-1) & factors.b.any(-1)).any(0)
    real[0] |= ~real.any()
    return Factors(factors.a[:, real], factors.b[:, real])


def _truncated(factors: Factors, rank: int) -> Factors:
    if factors.a.shape[1] <= rank:
        return factors
    a_basis, a_core = torch.linalg.qr(factors.a.mT.float())
    b_basis, b_core = torch.linalg.qr(factors.b.mT.float())
    left, size, right = torch.linalg.svd(b_core @ a_core.mT, full_matrices=False)
    left = left[..., :rank] * size[..., None, :rank]
    kind = factors.a.dtype
    return Factors((a_basis @ right.mT[..., :rank]).mT.to(kind), (b_basis @ left).mT.to(kind))


def _save_lora(edit: LowRankEdit, folder: Path, base_model: str) -> None:
    """Writes PEFT's layout: lora_A [rank, in], lora_B [out, rank], scaling alpha/r = 1; rank at most min(in, out)."""
    edit = LowRankEdit({s: _truncated(f, min(f.a.shape[-1], f.b.shape[-1])) for s, f in edit.factors.items()})
    rank = max(1, *(f.a.shape[1] for f in edit.factors.values()))
    tensors: dict[str, Tensor] = {}
    for site, f in edit.factors.items():
        key = f"base_model.model.{site}"
        tensors[f"{key}.lora_A.weight"] = pad_to(f.a[0], rank, 0).detach().cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = pad_to(f.b[0], rank, 0).T.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(edit.sites),
        "inference_mode": True,
    }
    save_file(tensors, folder / ADAPTER[0])
    (folder / ADAPTER[1]).write_text(json.dumps(config, indent=2) + "\n")
