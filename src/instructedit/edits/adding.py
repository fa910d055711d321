"""Putting edits together that were made one after another."""

from __future__ import annotations

from instructedit.edits.base import Edit
from instructedit.edits.dense import DenseEdit
from instructedit.edits.low_rank import LowRankEdit
from instructedit.errors import UserError


def add(first: Edit | None, second: Edit) -> Edit:
    """One edit that does what one edit does and then another.

    Changes of weights are summed. Factors stand side by side as long as they are smaller than the matrices that they
    make, and are multiplied out after that, so that neither memory nor a forward pass grows with the number of edits.

    Args:
        first: One edit; None is no edit.
        second: Another.

    Raises:
        UserError: If one of them is several edits, or the two are of sorts that cannot be put together.
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
        raise UserError(f"edits of the sorts {first.name!r} and {second.name!r} cannot be put together")
    return first.plus(second)


def to_dense(edit: Edit) -> DenseEdit:
    """A change of weights as matrices.

    Raises:
        UserError: If it is no change of weights.
    """
    return edit if isinstance(edit, DenseEdit) else DenseEdit.of({site: edit.delta(site) for site in edit.sites})


def _outgrown(edit: LowRankEdit) -> bool:
    """True if the factors are no smaller than the matrices that they make."""
    factors = sum(a.shape[1] * (a.shape[2] + b.shape[2]) for a, b in edit.factors.values())
    return factors >= sum(a.shape[2] * b.shape[2] for a, b in edit.factors.values())
