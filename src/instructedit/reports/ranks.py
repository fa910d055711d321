"""Trimming of edits by SVD to adapters of a rank that can be served, with a measure of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from instructedit.edits import DenseEdit, Edit, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.reports.report import EditReport

#: Allowed values of vLLM's ``max_lora_rank``, except 1 (``MaxLoRARanks`` in its vllm/config/lora.py; the default is
#: 16). A server takes adapters of up to one of these (``validate_legal`` in its vllm/lora/peft_helper.py).
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Trimmed:
    """An edit that was trimmed to a lower rank.

    Attributes:
        edit: The trimmed edit.
        rank: The largest rank among its sites.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ over all sites (Frobenius).
        kept: Number of predicted tokens on the probes that stay the same, and of all predicted tokens.
    """

    edit: LowRankEdit
    rank: int
    error: float
    kept: tuple[int, int]

    def __str__(self) -> str:
        same, probes = self.kept
        return f"rank {self.rank}: {self.error:.1%} of the change lost, {same} of {probes} predicted tokens stay"


def trimmed(lm: FrozenLM, edit: Edit, probes: Sequence[tuple[str, str]], rank: int | Literal["auto"]) -> Trimmed:
    """Trims one edit to a given or automatically chosen rank.

    Args:
        lm: The model that it edits.
        edit: An edit that changes weights.
        probes: (prompt, answer) pairs whose predicted tokens should stay.
        rank: The largest rank; ``auto`` is the smallest of `RANKS` that keeps all predicted tokens, or the edit's own
            rank if none does.

    Raises:
        UserError: If the edit does not change weights, or the rank is not possible.
    """
    if not isinstance(edit, LowRankEdit | DenseEdit):
        raise UserError(f"an edit of the kind {edit.name!r} is no change of weights, so it has no rank")
    own = _rank(edit)
    tokens = lm.encode(probes)
    expected = lm.scores.predictions(tokens, edit).predicted
    ranks = [size for size in RANKS if size < own] + [own] if rank == "auto" else [rank]
    for size in ranks:
        small = _compressed(edit, size)
        same = int((lm.scores.predictions(tokens, small).predicted == expected).sum())
        if same == len(expected):
            break
    return Trimmed(small, _rank(small), _error(edit, small), (same, len(expected)))


def served(lm: FrozenLM, report: EditReport, rank: int | Literal["auto"] | None) -> tuple[EditReport, Trimmed | None]:
    """Returns the report of one edit with the edit trimmed, and a description of the loss.

    Args:
        lm: The model.
        report: Report of one edit; its prompts are the probes.
        rank: See `trimmed`; None means ``auto`` for edits of low rank, and leaves others unchanged.
    """
    (edit,) = report.edits
    if rank is None and not isinstance(edit, LowRankEdit):
        return report, None
    probes = [(answer.prompt, each.request.target) for each in report.requests for answer in each.answers]
    small = trimmed(lm, edit, probes, "auto" if rank is None else rank)
    return replace(report, edits=(small.edit,)), small


def _compressed(edit: LowRankEdit | DenseEdit, rank: int) -> LowRankEdit:
    return edit.low_rank(rank) if isinstance(edit, DenseEdit) else edit.unpadded().compressed(rank)


def _rank(edit: LowRankEdit | DenseEdit) -> int:
    """Returns the largest rank among the sites: rows of the factors, or the largest rank that a matrix can have."""
    if isinstance(edit, DenseEdit):
        return max(min(matrices.shape[1:]) for matrices in edit.changes.values())
    return max(min(*f.a.shape[1:], f.b.shape[2]) for f in edit.unpadded().factors.values())


def _error(edit: Edit, small: Edit) -> float:
    lost, whole = torch.zeros(()), torch.zeros(())
    for site in edit.sites:
        full: Tensor = edit.delta(site).float().cpu()
        lost = lost + (full - small.delta(site).float().cpu()).square().sum()
        whole = whole + full.square().sum()
    return float((lost / whole.clamp(min=1e-30)).sqrt())
