"""Key-value slots added to a feed-forward layer: the edits of CaliNet and T-Patcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.edits.base import Edit, as_list, product_dtype
from instructedit.errors import UserError
from instructedit.rows import take_rows

#: Activations that slots may have. Saved edits store the index in this tuple: append only.
ACTIVATIONS = ("gelu", "relu", "silu")


class Slots(NamedTuple):
    """Key-value slots of one feed-forward layer; slots whose values are zero are padding.

    Attributes:
        keys: [n, slots, hidden].
        biases: [n, slots].
        values: [n, slots, hidden].
    """

    keys: Tensor
    biases: Tensor
    values: Tensor


@dataclass(frozen=True)
class SlotEdit(Edit):
    """n edits that widen a feed-forward layer: y = FFN(x) + Σ_s v_s act(k_s · x + b_s).

    A site is the module of the whole feed-forward layer, so that plain and gated ones are treated alike.

    Attributes:
        slots: Site → its slots.
        activation: One of `ACTIVATIONS`.
    """

    slots: Mapping[str, Slots]
    activation: str = "gelu"
    name: ClassVar[str] = "slots"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"slots: no activation {self.activation!r}; one of {', '.join(ACTIVATIONS)}")

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.slots)

    def __len__(self) -> int:
        return len(next(iter(self.slots.values())).keys)

    def __getitem__(self, index: int | slice | list[int]) -> Self:
        chosen = as_list(index, len(self))
        return type(self)({site: Slots(*(t[chosen] for t in s)) for site, s in self.slots.items()}, self.activation)

    def joined(self) -> Self:
        every = {site: Slots(*(t.flatten(0, 1)[None] for t in s)) for site, s in self.slots.items()}
        return type(self)(every, self.activation)

    def plus(self, other: Self) -> Self:
        if (self.sites, self.activation) != (other.sites, other.activation):
            raise UserError(f"slots of {', '.join(self.sites)} and of {', '.join(other.sites)} do not go together")
        pairs = {site: zip(self.slots[site], other.slots[site], strict=True) for site in self.sites}
        both = {site: Slots(*(torch.cat(parts, 1) for parts in pair)) for site, pair in pairs.items()}
        return type(self)(both, self.activation)

    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        kind = product_dtype(inputs.dtype)
        inputs, keys, biases, values = (t.to(kind) for t in (inputs, *self.slots[site]))
        if rows is not None and len(self) > 1:
            keys, biases, values = (take_rows(part, rows) for part in (keys, biases, values))
        act = getattr(F, self.activation)
        return (outputs + act(inputs @ keys.mT + biases.unsqueeze(1)) @ values).to(outputs.dtype)

    def state(self) -> dict[str, Tensor]:
        tensors = {f"{site}:{part}": getattr(s, part) for site, s in self.slots.items() for part in Slots._fields}
        return tensors | {"activation": torch.tensor(ACTIVATIONS.index(self.activation))}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        sites = dict.fromkeys(key.rsplit(":", 1)[0] for key in state if ":" in key)
        slots = {site: Slots(*(state[f"{site}:{part}"] for part in Slots._fields)) for site in sites}
        for site, (keys, biases, values) in slots.items():
            first = next(iter(slots.values())).keys
            if (
                keys.ndim != 3
                or keys.shape != values.shape
                or biases.shape != keys.shape[:2]
                or len(keys) != len(first)
            ):
                raise UserError(f"{site}: {[*keys.shape]}, {[*biases.shape]} and {[*values.shape]} make no slots")
        return cls(slots, ACTIVATIONS[int(state["activation"])])
