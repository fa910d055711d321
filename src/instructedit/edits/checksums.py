"""Checksums of saved tensors, by which corrupt files are rejected instead of loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from instructedit.errors import UserError

#: Key of a checksum in a saved editor's or edit's JSON card and in a checkpoint.
CHECKSUM = "sha256"


def file_checksum(file: Path) -> str:
    """Computes the SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Computes the SHA-256 (hex) of tensors: their names, dtypes, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_sound(tensors: Mapping[str, Tensor], found: str, expected: object, where: str) -> None:
    """Raises an error if tensors have changed since they were saved, or are not finite.

    Args:
        tensors: The tensors that were read.
        found: Their checksum.
        expected: The checksum that was saved with them; None if an older version saved none.
        where: The file or folder, for errors.

    Raises:
        UserError: If the checksums differ, or a tensor contains NaN or infinities.
    """
    if expected is not None and found != expected:
        raise UserError(f"{where}: damaged: its tensors are not those that were saved (checksum)")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds NaN or infinities")
