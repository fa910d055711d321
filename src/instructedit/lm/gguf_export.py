"""Export of an edit to a copy of its model's GGUF file: edited matrices are replaced, everything else is kept."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm.frozen import FrozenLM
from instructedit.lm.gguf import read_metadata
from instructedit.lm.sites import Site, dense_weight

_HEADER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")  # written by the writer itself


def write_edited(lm: FrozenLM, edit: Edit, source: str | Path, out: str | Path) -> None:
    """Writes a GGUF file with an edit in its weights, for llama.cpp and tools that are built on it.

    Edited matrices are written unpacked, in 16 bits (in 32 if the source has 32, or a value exceeds float16's range);
    all others keep their bytes.

    Args:
        lm: The model, as it was read from the file.
        edit: One change of weights.
        source: The GGUF file that the model came from.
        out: The file to write.

    Raises:
        UserError: If the edit is not a single change of weights, or the file is not the model's, or holds an edited
            matrix in another order.
    """
    if len(edit) != 1:
        raise UserError(f"a GGUF file takes one edit, got {len(edit)}: choose edit[i], or all of them by edit.joined()")
    lm.first_block(edit.sites)  # refuses an edit of another model
    changes = {site: edit.delta(site)[0].float().cpu() for site in edit.sites}
    architecture = read_metadata(source)["general.architecture"]
    reader = gguf.GGUFReader(source)
    names = _names(lm, changes, architecture, source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    new = {
        names[site.name]: _edited(lm, site, changes[site.name], tensors.get(names[site.name]), source)
        for site in lm.select(every=True)
        if site.name in changes
    }
    partial = Path(f"{out}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        for key, field in reader.fields.items():
            if key not in _HEADER:
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        writer.data_alignment = reader.alignment
        for tensor in reader.tensors:
            if tensor.name in new:
                writer.add_tensor(tensor.name, new[tensor.name])
            else:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _names(lm: FrozenLM, changes: dict[str, torch.Tensor], architecture: str, source: str | Path) -> dict[str, str]:
    """Maps each site to the name of its matrix in files of this architecture."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UserError(f"{source}: the gguf library knows no architecture {architecture!r}")
    naming = gguf.get_tensor_name_map(known[architecture], len(lm.forward.blocks))
    found = {site: naming.get_name(f"{site}.weight", try_suffixes=(".weight",)) for site in changes}
    if lost := [site for site, name in found.items() if name is None]:
        raise UserError(f"{source}: {lost[0]} has no name in GGUF files of {architecture}")
    return {site: name for site, name in found.items() if name is not None}


def _edited(
    lm: FrozenLM, site: Site, change: torch.Tensor, tensor: gguf.ReaderTensor | None, source: str | Path
) -> np.ndarray:
    """Adds the change to the file's matrix, and returns the result, [out, in]."""
    if tensor is None:
        raise UserError(f"{source}: holds no matrix of {site.name}: the file of another model?")
    before = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    weight = dense_weight(lm.model.get_submodule(site.name), site).detach().float().cpu()
    weight = weight.T if site.transposed else weight
    # The model may be held in half precision.
    if before.shape != change.shape or not torch.allclose(before, weight, rtol=2e-2, atol=1e-3):
        raise UserError(f"{source}: {tensor.name} is not {lm.name}'s {site.name}, or lies in another order there")
    after = (before + change).numpy()
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32 or np.abs(after).max() > np.finfo(np.float16).max:
        return after
    return after.astype(np.float16)
