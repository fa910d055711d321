"""Layer inputs over plain text: samples, and covariances (uncentred) C = E[u uᵀ], computed once and cached."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from instructedit.errors import UserError
from instructedit.lm.frozen import FrozenLM
from instructedit.lm.own_text import AUTO, documents_of, model_key, text_for
from instructedit.lm.tokens import TokenBatch, rows_of
from instructedit.paths import cache_folder, check_writable

#: Texts in one forward pass, and in one sum of squares in float32.
_ROWS = 64
#: Texts that are sorted by length together, so that a forward pass has little padding.
_SORTED = 4 * _ROWS


def covariance_file(lm: FrozenLM, site: str, text: str, tokens: int) -> Path:
    """Returns the cache file of a site's covariance over a number of tokens; it differs by model and by text file."""
    text = text_for(lm, text)
    path = Path(text).expanduser()
    edition = f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else ""
    key = model_key(lm, site, text, edition, tokens)
    return cache_folder() / "moments" / f"{key}.safetensors"


def covariances(lm: FrozenLM, sites: Iterable[str], text: str = AUTO, tokens: int = 100_000) -> dict[str, Tensor]:
    """Computes the covariance C = E[u uᵀ] of each site's inputs, or loads it if it was computed before.

    The text is streamed: memory holds one matrix for each site. Padding is left out; a text longer than the model's
    context is truncated. Batches are summed in float32, their sums in double precision.

    Args:
        lm: The unedited model.
        sites: Names of the layers.
        text: ``auto`` (the embedded corpus for an embedded model, ``sampled`` for any other), ``sampled`` (text that
            the model samples itself), or what `read_texts` reads.
        tokens: Number of tokens of it to use, or all if it has fewer.

    Returns:
        Site → [in, in], float32, on the CPU.

    Raises:
        UserError: If the text cannot be read or is empty.
    """
    files = {site: covariance_file(lm, site, text, tokens) for site in sites}
    missing = [site for site, file in files.items() if not file.is_file()]
    if missing:
        check_writable(files[missing[0]].parent, "$INSTRUCTEDIT_CACHE")  # else minutes of work would be lost
        print(f"{lm.name}: covariances over {tokens} tokens of {_called(lm, text)}", file=sys.stderr)
        sums: dict[str, Tensor] = {}
        count = 0
        with lm.applied.suspended():
            for inputs in _inputs(lm, missing, text, tokens):
                for site, u in inputs.items():
                    square = (u.T @ u).double().cpu()
                    sums[site] = sums[site] + square if site in sums else square
                count += len(u)
        for site, total in sums.items():
            _save((total / count).float(), files[site])
    return {site: _load(file) for site, file in files.items()}


def sample_inputs(lm: FrozenLM, site: str, text: str = AUTO, tokens: int = 1000) -> Tensor:
    """Returns the unedited model's inputs of a site over a text's first tokens, [tokens, in], on its device."""
    with lm.applied.suspended():
        return torch.cat([inputs[site] for inputs in _inputs(lm, [site], text, tokens)])


def _inputs(lm: FrozenLM, sites: list[str], text: str, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Yields the inputs of the sites batch by batch, each [positions, in] in float32; `tokens` positions in all."""
    left = tokens
    with tqdm(total=tokens, desc=f"{lm.name} reads {_called(lm, text)}", unit=" tokens", leave=False, delay=5) as bar:
        for batch in _batches(lm, text, tokens):
            layer_io = lm.record_activations(batch, sites, cached=False)
            real = batch.attention_mask.bool()
            yield {site: layer_io[site].inputs[real.to(lm.device)][:left].float() for site in sites}
            count = min(left, sum(batch.lengths))
            left -= count
            bar.update(count)
            if left <= 0:
                return
    if left == tokens:
        raise UserError(f"{text}: holds no text")


def _called(lm: FrozenLM, text: str) -> str:
    """Returns the name of a text for messages."""
    names = {"tiny": "the embedded corpus", "sampled": "text that it samples itself"}
    return names.get(found := text_for(lm, text), found)


def _batches(lm: FrozenLM, text: str, tokens: int) -> Iterator[TokenBatch]:
    """Yields the first texts, up to `tokens` tokens in all, in batches of similar length."""
    documents = documents_of(lm, text, cache_folder() / "sampled")
    while rows := _rows(lm, documents, tokens):
        tokens -= sum(map(len, rows))
        rows.sort(key=len)
        for start in range(0, len(rows), _ROWS):
            yield rows_of(rows[start : start + _ROWS]).to(lm.device)


def _rows(lm: FrozenLM, documents: Iterator[str], tokens: int) -> list[list[int]]:
    """Returns the token ids of the next texts: at most as many as are sorted together, and at most `tokens` tokens."""
    rows: list[list[int]] = []
    while len(rows) < _SORTED and tokens > 0 and (document := next(documents, None)) is not None:
        if ids := lm.text.document(document)[: min(lm.max_length, tokens)]:
            rows.append(ids)
            tokens -= len(ids)
    return rows


def _load(file: Path) -> Tensor:
    try:
        covariance = load_file(file)["second_moment"]
        if not covariance.isfinite().all():
            raise ValueError("it holds NaN or infinities")
        return covariance
    except Exception as error:
        raise UserError(f"{file}: corrupt ({error}); remove it, and it is computed anew") from error


def _save(matrix: Tensor, file: Path) -> None:
    """Writes the file atomically, even if other processes write it too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        save_file({"second_moment": matrix.contiguous()}, Path(folder, file.name))
        Path(folder, file.name).replace(file)
