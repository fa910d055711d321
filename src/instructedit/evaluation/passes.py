"""Rows of tokens in passes of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instructedit.edits import Edit
from instructedit.lm.prefix_trees import in_parts


def edit_numbers(edit: Edit | None, request_indices: Sequence[int]) -> list[int]:
    """The number of the edit that rows of these request_indices have: the owner's own, or the only one."""
    return [0] * len(request_indices) if edit is not None and len(edit) == 1 else list(request_indices)


def passes(
    rows: Sequence[list[int]], groups: Sequence[int], tokens: int, beside: Sequence[int] | None = None,
    trees: bool = False,
) -> Iterator[list[int]]:  # fmt: skip
    """Indices of rows that go through the model together.

    Args:
        rows: Token ids of each row.
        groups: The edit of each row; rows of one edit share what they begin with, where the model reads trees.
        tokens: Of a pass, padding included, at most (or of one row that has more).
        beside: Further tokens that each row takes room for, by default none.
        trees: Whether the model reads rows of one edit as a tree.
    """
    if trees:
        yield from in_parts(rows, groups, tokens, beside)
    elif beside is None:
        yield from chunks([(len(row),) for row in rows], tokens)
    else:
        yield from chunks([(more, len(row)) for more, row in zip(beside, rows, strict=True)], tokens)


def chunks(lengths: Sequence[tuple[int, ...]], tokens: int) -> Iterator[list[int]]:
    """Indices in groups of about one length that, padded, have at most so many tokens (or of one that has more).

    Args:
        lengths: Of the parts of each row, each of which is padded to the group's longest.
        tokens: Of a group, padding included.
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
