"""Adds edits that were made one after another."""

from __future__ import annotations

from instructedit.edits.base import Edit
from instructedit.edits.dense import DenseEdit
from instructedit.edits.low_rank import LowRankEdit
from instructedit.errors import UserError


def add(first: Edit | None, second: Edit) -> Edit:
    """Returns one edit with the effect of one edit followed by another.

    Changes of weights are summed. Factors are concatenated as long as they are smaller than the matrices that they
    represent, and multiplied out after that, so that memory and time do not grow with the number of edits.

    Args:
        first: One edit, or None for no edit.
        second: Another edit.

    Raises:
        UserError: If one of them holds several edits, or the two are of kinds that cannot be added.
    """
    if any(len(edit) != 1 for edit in (first, second) if edit is not None):
        raise UserError("several edits cannot be put together with another: choose edit[i], or use edit.joined()")
    if first is None or first.is_identity:
        return second
    if second.is_identity:
        return first
    if isinstance(first, LowRankEdit) and isinstance(second, LowRankEdit):
        both = first.plus(second.unpadded())
        return to_dense(both) if _outgrown(both) else both
    if first.is_weights and second.is_weights:
        return to_dense(first).plus(to_dense(second))
    if type(first) is not type(second):
        raise UserError(f"edits of the kinds {first.name!r} and {second.name!r} cannot be put together")
    return first.plus(second)


def to_dense(edit: Edit) -> DenseEdit:
    """Converts a change of weights to dense matrices.

    Raises:
        UserError: If the edit is not a change of weights.
    """
    return edit if isinstance(edit, DenseEdit) else DenseEdit.of({site: edit.delta(site) for site in edit.sites})


def _outgrown(edit: LowRankEdit) -> bool:
    """True if the factors are no smaller than the matrices that they represent."""
    factors = sum(a.shape[1] * (a.shape[2] + b.shape[2]) for a, b in edit.factors.values())
    return factors >= sum(a.shape[2] * b.shape[2] for a, b in edit.factors.values())
