"""Fingerprints that tell models apart by their configuration and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


def fingerprint(model: PreTrainedModel) -> str:
    """Digests a model's configuration and the name, shape, dtype and a sample of every tensor (sha256, hex)."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Digests weights by the integer sum of each tensor's bits (sha256, hex): exact in any order, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        whole = len(flat) // 8 * 8
        digest.update(f"{name} {int(flat[:whole].view(torch.int64).sum())}".encode())
        digest.update(flat[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()
