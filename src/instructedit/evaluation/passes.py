"""Grouping of rows of tokens into forward passes of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instructedit.edits import Edit
from instructedit.lm.prefix_trees import in_parts


def edit_numbers(edit: Edit | None, request_indices: Sequence[int]) -> list[int]:
    """Returns the edit index of each row: its request's own edit, or 0 if one edit serves all requests."""
    return [0] * len(request_indices) if edit is not None and len(edit) == 1 else list(request_indices)


def passes(
    rows: Sequence[list[int]], groups: Sequence[int], tokens: int, beside: Sequence[int] | None = None,
    trees: bool = False,
) -> Iterator[list[int]]:  # fmt: skip
    """Groups row indices into passes, each of which goes through the model at once.

    Args:
        rows: Token ids of each row.
        groups: The edit of each row; rows of one edit share a common prefix where the model supports prefix trees.
        tokens: Largest number of tokens in a pass, padding included; a longer row gets a pass of its own.
        beside: Further tokens to reserve for each row; none by default.
        trees: Whether the model reads rows of one edit as a prefix tree.
    """
    if trees:
        yield from in_parts(rows, groups, tokens, beside)
    elif beside is None:
        yield from chunks([(len(row),) for row in rows], tokens)
    else:
        yield from chunks([(more, len(row)) for more, row in zip(beside, rows, strict=True)], tokens)


def chunks(lengths: Sequence[tuple[int, ...]], tokens: int) -> Iterator[list[int]]:
    """Groups row indices by similar length such that each padded group stays within the token budget.

    A row that exceeds the budget forms a group of its own.

    Args:
        lengths: Lengths of the parts of each row; each part is padded to the longest of its group.
        tokens: Token budget of a group, padding included.
    """
    group: list[int] = []
    longest: tuple[int, ...] = ()
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        wider = tuple(map(max, longest or lengths[i], lengths[i]))
        if group and (len(group) + 1) * sum(wider) > tokens:
            yield group
            group, wider = [], lengths[i]
        longest = wider
        group.append(i)
    if group:
        yield group
