"""A codebook that replaces a layer's outputs near its keys: the edits of GRACE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.edits.base import Edit, as_list
from instructedit.errors import UserError

#: Gap between two balls that were split, so that neither contains the other's border.
_GAP = 1e-5
#: Relative margin of a widened ball: a look-up computes the distance again, with a rounding error in bfloat16.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class CodebookEdit(Edit):
    """n codebooks of one layer: y = v_j if the nearest key k_j has ‖x − k_j‖₂ ≤ ε_j, otherwise y = W x unchanged.

    Every position of a row is looked up separately (causal; the same if the row is generated token by token), so that
    an output outside all balls equals the unedited layer's bit for bit.

    Attributes:
        site: Name of the layer.
        keys: [n, entries, in].
        values: [n, entries, out].
        radii: ε, [n, entries]; negative where there is no entry.
        labels: The token ids that each entry was made for, [n, entries, tokens], padded with −1.
    """

    site: str
    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor
    name: ClassVar[str] = "codebook"

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        chosen = as_list(index, len(self))
        return type(self)(self.site, *(t[chosen] for t in (self.keys, self.values, self.radii, self.labels)))

    def joined(self) -> Self:
        """Merges all entries into one codebook, one after the other by GRACE's rules (its algorithm 1).

        A key outside all balls becomes a new entry. A key within reach of an entry with the same label only widens that
        entry's ball; if the labels differ, both balls shrink to half their distance. A key that is already present
        with another label replaces that entry, so that the newer edit takes effect.
        """
        return self._filled(0)

    def plus(self, other: Self) -> Self:
        """Adds another codebook's entries to this one's by the rules of `joined`."""
        if self.site != other.site:
            raise UserError(f"codebooks of {self.site} and of {other.site} do not go together")
        width = max(self.labels.shape[2], other.labels.shape[2])
        padded = [F.pad(each.labels, (0, width - each.labels.shape[2]), value=-1) for each in (self, other)]
        pairs = ((self.keys, other.keys), (self.values, other.values), (self.radii, other.radii), padded)
        both = type(self)(self.site, *(torch.cat([*pair], 1) for pair in pairs))
        return both._filled(self.keys.shape[1])

    def _filled(self, first: int) -> Self:
        """Builds one codebook of all entries, adding them in order to the first `first`, which are in it already."""
        keys, radii, labels = self.keys.flatten(0, 1), self.radii.flatten().clone(), self.labels.flatten(0, 1)
        entries = (radii >= 0).nonzero().flatten().tolist()
        book = [entry for entry in entries if entry < first]  # indices of the entries that are kept
        for new in entries[len(book) :]:
            if book:
                distances = (keys[book] - keys[new]).norm(dim=-1)
                near = book[int(distances.argmin())]
                distance = distances.min()
                if distance <= radii[near] + radii[new]:
                    if torch.equal(labels[near], labels[new]):
                        radii[near] = torch.maximum(radii[near], distance * (1 + _ROUNDING))
                        continue
                    if distance <= _GAP:  # the same question again: the newer answer replaces the old one
                        book.remove(near)
                        book.append(new)
                        continue
                    radii[near] = torch.minimum(radii[near], (distance / 2 - _GAP).clamp(min=0))
                    radii[new] = torch.minimum(radii[new], distance / 2)
            book.append(new)
        chosen = torch.tensor(book, dtype=torch.long, device=keys.device)
        parts = (keys, self.values.flatten(0, 1), radii, labels)
        return type(self)(self.site, *(part[chosen][None] for part in parts))

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        index = torch.arange(len(self), device=inputs.device) if rows is None else rows
        index = index.expand(len(inputs))
        if self.keys.shape[1] == 0:
            return outputs
        keys, radii = self.keys[index].float(), self.radii[index]
        distances = torch.cdist(inputs.float(), keys, compute_mode="donot_use_mm_for_euclid_dist")  # [rows, seq, entry]
        nearest = distances.masked_fill((radii < 0).unsqueeze(1), torch.inf).argmin(-1, keepdim=True)
        inside = distances.gather(-1, nearest) <= radii.unsqueeze(1).expand_as(distances).gather(-1, nearest)
        row, position = inside.squeeze(-1).nonzero(as_tuple=True)
        replaced = self.values[index[row], nearest[row, position, 0]].to(outputs.dtype)
        return outputs.index_put((row, position), replaced)

    def state(self) -> dict[str, Tensor]:
        parts = {"keys": self.keys, "values": self.values, "radii": self.radii, "labels": self.labels}
        return {f"{self.site}:{part}": tensor for part, tensor in parts.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        site = next(iter(state)).rsplit(":", 1)[0]
        parts = [state[f"{site}:{part}"] for part in ("keys", "values", "radii", "labels")]
        if [part.ndim for part in parts] != [3, 3, 2, 3] or len({part.shape[:2] for part in parts}) != 1:
            raise UserError(f"{site}: {', '.join(str(list(part.shape)) for part in parts)} make no codebook")
        return cls(site, *parts)
