"""What an edit is: a value that holds n different edits and knows how each changes the output of a site."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructedit.edits.checksums import CHECKSUM, check_sound, file_checksum
from instructedit.errors import UserError
from instructedit.registry import plugin
from instructedit.renamed import Renamed

META, TENSORS = "edit.json", "edit.safetensors"
#: What sorts of edits are called in folders that earlier versions saved.
_OLD_NAMES = {"nothing": "identity"}


class Edit(ABC):
    """n edits side by side, not yet applied to anything.

    A *site* is an edited linear layer, called by its module name. Each row of a batch has one of the n edits.

    Attributes:
        name: Registry name of this sort of edit; written into saved edits.
    """

    name: ClassVar[str] = ""
    #: Whether the edits are changes of weights, which a model can hold for good.
    is_weights: ClassVar[bool] = False
    #: Whether a site's output at a position depends on its input there alone, wherever in a row the position is.
    positionwise: ClassVar[bool] = True

    @property
    def is_identity(self) -> bool:
        """True if applying the edits leaves all outputs unchanged."""
        return False

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """Names of the edited layers."""

    @abstractmethod
    def __len__(self) -> int:
        """How many edits."""

    @abstractmethod
    def __getitem__(self, index: int | slice | list[int]) -> Self:
        """The chosen edits, in that order; an int gives an edit of length one."""

    @abstractmethod
    def joined(self) -> Self:
        """One edit that does what all n do, for a model that should know them all."""

    def plus(self, other: Self) -> Self:
        """One edit that does what this one does and then another of the same sort, each of length one.

        Raises:
            UserError: If edits of this sort cannot be put together.
        """
        raise UserError(f"edits of the sort {self.name!r} cannot be put together")

    @abstractmethod
    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        """The output of a site with the edits on.

        Args:
            site: Name of the layer.
            inputs: What the layer saw, [rows, seq, in].
            outputs: What the unedited layer gives, [rows, seq, out].
            rows: Which edit each row has, [rows]; None: row i has edit i, or all rows the only one.

        Returns:
            The edited output, [rows, seq, out].
        """

    def delta(self, site: str) -> Tensor:
        """The dense change of the layer's weight, [n, out, in].

        Raises:
            UserError: If this sort of edit is no change of weights.
        """
        raise UserError(f"an edit of the kind {self.name!r} is no change of weights; it can only be applied")

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything needed to make the edit again."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""

    def map(self, change: Any) -> Self:
        """The same edits with `change` applied to every tensor (a device, a dtype, detach)."""
        return self.from_state({name: change(tensor) for name, tensor in self.state().items()})

    def detach(self) -> Self:
        """The same edits without gradients."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same edits on another device or in another dtype (integers keep theirs)."""

        def moved(tensor: Tensor) -> Tensor:
            target = torch.empty(0, device=tensor.device).to(*args, **kwargs)
            return tensor.to(target.device, target.dtype if tensor.is_floating_point() else None)

        return self.map(moved)

    def save_pretrained(self, folder: str | Path, **meta: str) -> None:
        """Writes the edits to a folder, for `load_edit`.

        Args:
            folder: Made if need be.
            meta: Plain facts to keep beside them, such as the base model.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state().items()}
        save_file(state, folder / TENSORS)
        card = {"edit": self.name, "edits": len(self), "tensors": list(state), **meta}
        card[CHECKSUM] = file_checksum(folder / TENSORS)
        (folder / META).write_text(json.dumps(card, indent=2) + "\n")


Renamed.keep(Edit, changes_nothing="is_identity")


def load_edit(folder: str | Path) -> Edit:
    """Reads edits that `Edit.save_pretrained` wrote.

    Raises:
        UserError: If the folder holds none, or damaged ones: not what was saved, or with NaN or infinities.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text())
        kind = plugin(Edit, "instructedit.edits", _OLD_NAMES.get(meta["edit"], meta["edit"]))
        tensors = load_file(folder / TENSORS)
        check_sound(tensors, file_checksum(folder / TENSORS), meta.get(CHECKSUM), str(folder))
        return kind.from_state({name: tensors[name] for name in meta["tensors"]})  # in the order of the sites
    except UserError as error:
        raise error if str(error).startswith(str(folder)) else UserError(f"{folder}: damaged edit: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no saved edit here ({Path(error.filename or TENSORS).name} is missing)") from error
    except Exception as error:
        raise UserError(f"{folder}: damaged edit: {error}") from error


def as_list(index: int | slice | list[int], count: int) -> list[int]:
    """What an index of `Edit.__getitem__` chooses of `count` edits.

    Raises:
        IndexError: Outside them, so that iteration ends.
    """
    if isinstance(index, list):
        return index
    chosen = range(count)[index]
    return [chosen] if isinstance(chosen, int) else list(chosen)


def nested(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state of a part of an edit, whose tensors are called ``name:…`` in that of the whole."""
    return {key.removeprefix(f"{name}:"): tensor for key, tensor in state.items() if key.startswith(f"{name}:")}


def pad_to(tensor: Tensor, size: int, dim: int) -> Tensor:
    """With zeros at the end of one dimension, up to `size`."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a product with another one behind it is computed: float16 ends at 65504, which inner products reach."""
    return torch.float32 if dtype == torch.float16 else dtype
