"""Low-rank edits as they were made, one part after another, so that a thousand need no padding to the longest."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

from instructedit.edits.base import as_list
from instructedit.edits.low_rank import LowRankEdit, stack


@dataclass(frozen=True)
class Pile:
    """n low-rank edits in parts. To add a part copies nothing; to choose edits copies these alone.

    Attributes:
        parts: The edits, in order; each part is padded to its own longest.
    """

    parts: tuple[LowRankEdit, ...]

    @classmethod
    def of(cls, *changes: LowRankEdit | Pile) -> Self:
        """Returns the edits of all, in order, with padding that a part shares left out."""
        piles = [each.parts if isinstance(each, Pile) else (each.unpadded(),) for each in changes]
        return cls(tuple(part for pile in piles for part in pile))

    @cached_property
    def starts(self) -> list[int]:
        """The index of each part's first edit, and the number of all."""
        return list(accumulate(map(len, self.parts), initial=0))

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the edited layers."""
        return self.parts[0].sites

    @property
    def nbytes(self) -> int:
        """Memory of all factors, in bytes."""
        return sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int | slice | list[int]) -> LowRankEdit:
        """Returns the chosen edits, in that order, padded to the longest of their parts."""
        chosen = [(edit, bisect_right(self.starts, edit) - 1) for edit in as_list(index, len(self))]
        found = [self.parts[part][edit - self.starts[part]] for edit, part in chosen]
        return stack(found) if found else self.parts[0][[]]

    def whole(self) -> LowRankEdit:
        """Returns all edits as one value, padded to the longest."""
        return stack(list(self.parts))
