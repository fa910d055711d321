"""Edits as adapters of a rank that can be served: trimmed by SVD, with what that loses."""

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

#: Values that vLLM's ``max_lora_rank`` may have, but for 1 (``MaxLoRARanks`` in its vllm/config/lora.py; the default is
#: 16). A server takes adapters of up to one of these (``validate_legal`` in its vllm/lora/peft_helper.py).
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Trimmed:
    """An edit of less rank.

    Attributes:
        edit: The edit.
        rank: Its rank: that of its largest site.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ over all sites (Frobenius).
        kept: Predicted tokens on the probes that are still the same, of how many.
    """

    edit: LowRankEdit
    rank: int
    error: float
    kept: tuple[int, int]

    def __str__(self) -> str:
        same, probes = self.kept
        return f"rank {self.rank}: {self.error:.1%} of the change lost, {same} of {probes} predicted tokens stay"


def trimmed(lm: FrozenLM, edit: Edit, probes: Sequence[tuple[str, str]], rank: int | Literal["auto"]) -> Trimmed:
    """Trims one edit.

    Args:
        lm: The model that it edits.
        edit: A change of weights.
        probes: (prompt, answer) pairs whose predicted tokens should stay.
        rank: The largest rank; ``auto`` is the smallest of `RANKS` with which all predicted tokens stay, or where none
            keeps them, the edit's own rank.

    Raises:
        UserError: If the edit is no change of weights, or there is no such rank.
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
    """The report of one edit with the edit trimmed, and what that lost.

    Args:
        lm: The model.
        report: Of one edit, whose prompts are the probes.
        rank: See `trimmed`; None is ``auto`` for edits of low rank, and leaves others as they are.
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
    """The rank of the largest site: rows of factors, or what a matrix can have at most."""
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
