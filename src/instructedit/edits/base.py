"""The base of all kinds of edits: a value that holds n edits and computes how each changes a site's output."""

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
#: Files of a LoRA adapter in PEFT's layout: its tensors and its config.
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
#: Names of kinds of edits in folders saved by earlier versions → current names.
_OLD_NAMES = {"nothing": "identity"}


class Edit(ABC):
    """A batch of n edits, not yet applied to any model.

    A *site* is an edited linear layer, identified by its module name. Each row of a batch uses one of the n edits.

    Attributes:
        name: Registry name of this kind of edit; written into saved edits.
    """

    name: ClassVar[str] = ""
    #: Whether the edits are changes of weights, which can be merged into a model permanently.
    is_weights: ClassVar[bool] = False
    #: Whether a site's output at a position depends only on its input there, and not on where the position is.
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
        """Returns the number of edits."""

    @abstractmethod
    def __getitem__(self, index: int | slice | list[int]) -> Self:
        """Returns the chosen edits, in that order; an int gives an edit of length one."""

    @abstractmethod
    def joined(self) -> Self:
        """Combines all n edits into one, for a model that should know them all."""

    def plus(self, other: Self) -> Self:
        """Returns one edit with the effect of this one followed by another of its kind, each of length one.

        Raises:
            UserError: If edits of this kind cannot be added.
        """
        raise UserError(f"edits of the kind {self.name!r} cannot be put together")

    @abstractmethod
    def change(self, site: str, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> Tensor:
        """Computes the output of a site with the edits applied.

        Args:
            site: Name of the layer.
            inputs: The layer's input, [rows, seq, in].
            outputs: The unedited layer's output, [rows, seq, out].
            rows: Index of each row's edit, [rows]; None: row i has edit i, or all rows have the only one.

        Returns:
            The edited output, [rows, seq, out].
        """

    def delta(self, site: str) -> Tensor:
        """Computes the dense change of the layer's weight, [n, out, in].

        Raises:
            UserError: If this kind of edit is not a change of weights.
        """
        raise UserError(f"an edit of the kind {self.name!r} is no change of weights; it can only be applied")

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Returns all tensors needed to rebuild the edit by `from_state`."""

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.state().values())

    @classmethod
    @abstractmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Builds an edit from what `state` returned."""

    def map(self, change: Any) -> Self:
        """Returns the edits with `change` applied to every tensor, e.g. a move to a device, a cast or detach."""
        return self.from_state({name: change(tensor) for name, tensor in self.state().items()})

    def detach(self) -> Self:
        """Returns the edits detached from the computation graph."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the edits to another device or casts them to another dtype (integers keep theirs)."""

        def moved(tensor: Tensor) -> Tensor:
            target = torch.empty(0, device=tensor.device).to(*args, **kwargs)
            return tensor.to(target.device, target.dtype if tensor.is_floating_point() else None)

        return self.map(moved)

    def save_pretrained(self, folder: str | Path, **meta: str) -> None:
        """Writes the edits to a folder, for `load_edit`.

        Args:
            folder: Created if necessary.
            meta: Further facts to save with them, such as the base model.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ADAPTER:  # of another edit that was saved here before
            (folder / name).unlink(missing_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state().items()}
        save_file(state, folder / TENSORS)
        card = {"edit": self.name, "edits": len(self), "tensors": list(state), **meta}
        card[CHECKSUM] = file_checksum(folder / TENSORS)
        (folder / META).write_text(json.dumps(card, indent=2) + "\n")


Renamed.keep(Edit, changes_nothing="is_identity")


def load_edit(folder: str | Path) -> Edit:
    """Reads edits that `Edit.save_pretrained` wrote.

    Raises:
        UserError: If the folder holds none, or damaged ones: changed since they were saved, or with NaN or infinities.
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
    """Converts an index of `Edit.__getitem__` to a list of indices of `count` edits, none of them negative.

    Raises:
        IndexError: If it is out of range, so that iteration ends.
    """
    if isinstance(index, list):
        return [range(count)[i] for i in index]
    chosen = range(count)[index]
    return [chosen] if isinstance(chosen, int) else list(chosen)


def nested(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Extracts the state of a part of an edit, whose tensors are named ``name:…`` in the state of the whole."""
    return {key.removeprefix(f"{name}:"): tensor for key, tensor in state.items() if key.startswith(f"{name}:")}


def pad_to(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Pads one dimension with zeros at its end, up to `size`."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype for inner products: float32 for float16, whose maximum of 65504 they can exceed."""
    return torch.float32 if dtype == torch.float16 else dtype
