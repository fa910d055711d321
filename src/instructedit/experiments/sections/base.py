"""The interface of sections: what an experiment found → tables and figures of its results page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from instructedit.experiments.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

#: Where sections live; a module there with a subclass of `Section` is enough to add one.
PACKAGE = "instructedit.experiments.sections"


@dataclass(frozen=True)
class Panel:
    """A table or a figure of a section.

    Attributes:
        name: Stem of its files.
        title: Above it.
        note: How to read it, in a sentence or two.
        frame: A table.
        figure: A figure.
        markdown: The table in its own layout, in place of the frame's columns and rows.
        html: The same for the results page, with all text escaped.
        terminal: What the terminal shows of it, a text or a renderable of rich; nothing by default.
        folded: Whether the results page shows it only when asked.
        files: Further files to write beside it, name to text.
    """

    name: str
    title: str
    note: str = ""
    frame: DataFrame | None = None
    figure: Figure | None = None
    markdown: str | None = None
    html: str | None = None
    terminal: Any = None
    folded: bool = False
    files: dict[str, str] = field(default_factory=dict)


class Section(ABC):
    """A section of the results page. It yields nothing where the results have not what it shows."""

    #: By which a grid's key ``sections`` asks for it.
    name: ClassVar[str] = ""

    @abstractmethod
    def show(self, results: Results) -> Iterator[Panel]:
        """Makes the section's tables and figures, in order."""
