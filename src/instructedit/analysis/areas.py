"""Editing areas (Section 4.2): where in weight space an editor writes, and how well that separates the tasks.

The editing area of a record at an edited matrix is its update ΔW = Σ_t b_t a_tᵀ divided by its Frobenius norm. It is
kept as the factors a and b; everything here is computed from small Gram matrices, never from a dense ΔW.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from instructedit.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from instructedit.edits import LowRankEdit

_FORMAT, _VERSION = "instructedit-editing-areas", "1"
_BLOCK = 64  # records whose factors are held in double precision at once


@dataclass
class EditingAreas:
    """The normalised updates of one editor for many records, in factored form.

    Attributes:
        ids: Record ids, [records].
        tasks: Task of each record, [records].
        factors: Site name to a, [records, rank, in], and b, [records, rank, out], padded with zero rows. Each
            record's Σ_t b_t a_tᵀ has Frobenius norm 1, or is zero where the editor changed nothing.
        norms: Site name to the Frobenius norms before normalising, [records].

    Raises:
        ValueError: If the lengths or shapes do not fit together.
    """

    ids: list[str]
    tasks: list[str]
    factors: dict[str, tuple[Tensor, Tensor]]
    norms: dict[str, Tensor]

    def __post_init__(self) -> None:
        n = len(self)
        if len(self.tasks) != n or self.norms.keys() != self.factors.keys():
            raise ValueError("expected one task for each record and norms for each site")
        for site, (a, b) in self.factors.items():
            if not (a.ndim == b.ndim == 3 and a.shape[:2] == b.shape[:2] and len(a) == len(self.norms[site]) == n):
                raise ValueError(f"{site}: expected {n} x [rank, in], [rank, out], got {[*a.shape]}, {[*b.shape]}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def site_names(self) -> list[str]:
        """Names of the edited matrices, in the editor's order."""
        return list(self.factors)

    @classmethod
    def from_factors(
        cls, ids: Sequence[str], tasks: Sequence[str], factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> EditingAreas:
        """Normalises updates Σ_t b_t a_tᵀ, given in the layout of the attributes; the scale goes into b.

        Raises:
            UserError: If an update is not finite.
            ValueError: If the lengths or shapes do not fit together.
        """
        scaled, norms = {}, {}
        for site, (a, b) in factors.items():
            norm = _frobenius_norms(a.detach(), b.detach())
            if not norm.isfinite().all():
                record = ids[int(norm.isfinite().int().argmin())]
                raise UserError(f"{site}: the update of record {record} is not finite")
            scale = torch.where(norm > 0, 1 / norm, 0.0).float()
            scaled[site] = a.detach().float(), b.detach().float() * scale[:, None, None]
            norms[site] = norm.float()
        return cls(list(ids), list(tasks), scaled, norms)

    @classmethod
    def of_edits(
        cls, ids: Sequence[str], tasks: Sequence[str], edit: LowRankEdit, max_rank: int | None = None
    ) -> EditingAreas:
        """Returns the areas of n edits on the CPU, with all or the leading directions (errors: see `from_factors`)."""
        kept = (edit.compressed(max_rank) if max_rank else edit).to("cpu")
        return cls.from_factors(ids, tasks, dict(kept.factors))

    @staticmethod
    def concat(parts: Sequence[EditingAreas]) -> EditingAreas:
        """Concatenates the records of all parts; zero rows pad them to the largest rank.

        Raises:
            ValueError: If there is no part, or the parts do not have the same sites.
        """
        if not parts or any(set(part.site_names) != set(parts[0].site_names) for part in parts):
            raise ValueError("expected one or more parts with the same sites")
        factors = {}
        for site in parts[0].site_names:
            rank = max(part.factors[site][0].shape[1] for part in parts)
            padded = [[pad(x, (0, 0, 0, rank - x.shape[1])) for x in part.factors[site]] for part in parts]
            factors[site] = torch.cat([a for a, _ in padded]), torch.cat([b for _, b in padded])
        norms = {site: torch.cat([part.norms[site] for part in parts]) for site in factors}
        ids, tasks = ([name for part in parts for name in getattr(part, key)] for key in ("ids", "tasks"))
        return EditingAreas(ids, tasks, factors, norms)

    def save(self, path: str | Path, half: bool = False) -> None:
        """Writes one safetensors file, with the ids, tasks and site names in its metadata.

        Args:
            path: The file.
            half: Store the factors in float16, which takes half the bytes and keeps three digits.
        """
        kind = torch.float16 if half else torch.float32
        tensors = {f"{site}/norm": norm for site, norm in self.norms.items()}
        for site, (a, b) in self.factors.items():
            tensors |= {f"{site}/a": a.to(kind).contiguous(), f"{site}/b": b.to(kind).contiguous()}
        index = json.dumps({"ids": self.ids, "tasks": self.tasks, "sites": self.site_names})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"format": _FORMAT, "version": _VERSION, "index": index})

    @classmethod
    def load(cls, path: str | Path) -> EditingAreas:
        """Reads a file that ``save`` wrote.

        Raises:
            UserError: If the file is missing, corrupt, or of another format.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
                    raise ValueError(f"not format {_FORMAT}, version {_VERSION}")
                index = json.loads(metadata["index"])
                read = file.get_tensor
                factors = {site: (read(f"{site}/a").float(), read(f"{site}/b").float()) for site in index["sites"]}
                return cls(index["ids"], index["tasks"], factors, {site: read(f"{site}/norm") for site in factors})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as editing areas: {' '.join(str(error).split())}") from error


def cosines(areas: EditingAreas, site: str, other: EditingAreas | None = None, chunk: int = 2048) -> Tensor:
    """Computes Frobenius inner products ⟨ΔW_i, ΔW_j⟩ = Σ_st (a_is · a_jt)(b_is · b_jt) of normalised updates.

    The time grows with the square of the sum of the ranks, padding excluded. Besides the result, memory holds a copy of
    the factors without their padding, two blocks of chunk² floats, and one of records x chunk. Rounding errors are
    about 1e-7, and 1e-7 / ρ² for updates whose rows cancel down to a share ρ of their size.

    Args:
        areas: The rows of the result.
        site: Name of the edited matrix.
        other: The columns of the result, such as another editor's areas; by default ``areas`` again.
        chunk: Factor rows multiplied at once.

    Returns:
        [records, records of other], from -1 to 1; 0 where one of the two is zero.

    Raises:
        UserError: If there is no such site.
    """
    a, b, record = _rows(areas, site)
    a_other, b_other, record_other = (a, b, record) if other is None else _rows(other, site)
    result = a.new_zeros(len(areas), len(areas if other is None else other))
    for i in range(0, len(a), chunk):
        for j in range(i if other is None else 0, len(a_other), chunk):
            rows, columns = slice(i, i + chunk), slice(j, j + chunk)
            products = (a[rows] @ a_other[columns].T).mul_(b[rows] @ b_other[columns].T)
            if other is None and i == j:
                products /= 2  # the result is mirrored below, which would count this block twice
            summed = a.new_zeros(len(areas), products.shape[1]).index_add_(0, record[rows], products)
            result.index_add_(1, record_other[columns], summed)
    return (result + result.T if other is None else result).clamp_(-1, 1)


def principal_components(areas: EditingAreas, site: str, k: int = 50) -> NDArray[np.float64]:
    """Computes exact principal component coordinates of the vectorised areas from the centred Gram matrix.

    Returns:
        [records, min(k, records)], largest variance first; the largest entry of each component is positive.

    Raises:
        UserError: If there is no such site.
    """
    return _coordinates(cosines(areas, site), k)


def fitting_perplexity(records: int, perplexity: float) -> float:
    """Returns the perplexity that ``embed`` uses: at most a third of a record's neighbours, and at least 1."""
    return min(perplexity, max(1.0, (records - 1) / 3))


def embed(
    areas: EditingAreas, site: str, method: Literal["tsne", "pca"] = "tsne", perplexity: float = 30, seed: int = 0
) -> NDArray[np.float64]:
    """Computes a map of the areas: their first two principal components, or t-SNE of the first 50.

    t-SNE (van der Maaten and Hinton 2008) keeps neighbourhoods; distances between clusters mean nothing. With few
    records its perplexity is reduced to ``fitting_perplexity``. The same areas and seed give the same map.

    Returns:
        [records, 2]; the coordinates of t-SNE have no unit.

    Raises:
        UserError: If there is no such site.
        ValueError: If the method is unknown.
    """
    if method not in ("tsne", "pca"):
        raise ValueError(f"method: expected tsne or pca, got {method}")
    components = principal_components(areas, site)
    start = np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1]))))
    if method == "pca" or len(areas) < 3 or not start.any():
        return start

    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start *= 1e-4 / start[:, 0].std()
    perplexity = fitting_perplexity(len(areas), perplexity)
    tsne = TSNE(init=start, perplexity=perplexity, max_iter=1000, random_state=seed)
    with threadpool_limits(1):  # more threads are slower here, and their order of summation would change the map
        return np.asarray(tsne.fit_transform(components), dtype=np.float64)


def separation(areas: EditingAreas, site: str, seed: int = 0) -> dict[str, float]:
    """Measures how far the areas of different tasks lie apart, in the full space and not on a map.

    Returns:
        ``silhouette`` of the tasks under cosine distance, -1 to 1 (Rousseeuw 1987); ``variance_ratio``, the scatter of
        the task means over the scatter within tasks; ``probe_accuracy`` of a logistic regression on the first 50
        principal components, 0 to 1, over up to 5 stratified folds that ``seed`` draws; ``chance``, the largest task's
        share of the records, which a blind probe would reach. nan for fewer than 2 tasks, or too few records.

    Raises:
        UserError: If there is no such site.
    """
    gram = cosines(areas, site).cpu()
    tasks, labels, counts = np.unique(areas.tasks, return_inverse=True, return_counts=True)
    scores = dict.fromkeys(("silhouette", "variance_ratio", "probe_accuracy", "chance"), math.nan)
    if 1 < len(tasks) < len(areas):
        from sklearn.metrics import silhouette_score

        distances = (1 - gram).fill_diagonal_(0).numpy()
        scores["silhouette"] = float(silhouette_score(distances, labels, metric="precomputed"))
        scores["variance_ratio"] = _variance_ratio(gram.double().numpy(), np.eye(len(tasks))[labels])
        scores["chance"] = float(counts.max() / len(areas))
        if counts.min() > 1:
            scores["probe_accuracy"] = _probe(_coordinates(gram, 50), labels, min(5, int(counts.min())), seed)
    return scores


def _frobenius_norms(a: Tensor, b: Tensor) -> Tensor:
    """Returns Frobenius norms, [records], in double precision: ‖Σ_t b_t a_tᵀ‖² = Σ_st (a_s · a_t)(b_s · b_t)."""
    squares = []
    for x, y in zip(torch.split(a, _BLOCK), torch.split(b, _BLOCK), strict=True):
        x, y = x.double(), y.double()
        gram = (x @ x.mT) * (y @ y.mT)
        square, spread = gram.sum((1, 2)), gram.diagonal(dim1=1, dim2=2).sum(1)
        squares.append(square.masked_fill(square < 1e-12 * spread, 0.0))  # rows that cancel leave only rounding errors
    return torch.cat(squares).sqrt()


def _rows(areas: EditingAreas, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the factor rows that are not padding, a [rows, in] and b [rows, out], and each row's record [rows]."""
    if site not in areas.factors:
        raise UserError(f"no edited matrix named {site}; there are {', '.join(areas.site_names)}")
    a, b = areas.factors[site]
    kept = (a != 0).any(-1) & (b != 0).any(-1)
    return a[kept], b[kept], kept.nonzero()[:, 0]


def _coordinates(gram: Tensor, k: int) -> NDArray[np.float64]:
    gram = gram.double()
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = (x.flip(-1)[..., :k] for x in torch.linalg.eigh(centred))
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return np.asarray((vectors * largest.sign() * values.clamp_min(0).sqrt()).cpu())


def _variance_ratio(gram: NDArray[np.float64], member: NDArray[np.float64]) -> float:
    # The scatter of n vectors about their mean is Σ_i ⟨x_i, x_i⟩ - Σ_ij ⟨x_i, x_j⟩ / n; member is [records, tasks].
    total = np.trace(gram) - gram.sum() / len(gram)
    within = np.trace(gram) - (np.diag(member.T @ gram @ member) / member.sum(0)).sum()
    return float((total - within) / within) if within > 0 else math.nan


def _probe(coordinates: NDArray[np.float64], labels: NDArray[np.int64], folds: int, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    # One scale for all components: scaling each on its own would amplify those that are mere rounding errors.
    scaled = coordinates / max(float(coordinates.std()), 1e-12)
    return float(cross_val_score(LogisticRegression(max_iter=1000), scaled, labels, cv=split).mean())
