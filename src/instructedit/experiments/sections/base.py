"""The interface of sections, which turn an experiment's results into tables and figures of its results page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from instructedit.experiments.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

#: The package of sections; a module there with a subclass of `Section` is enough to add one.
PACKAGE = "instructedit.experiments.sections"


@dataclass(frozen=True)
class Panel:
    """A table or a figure of a section.

    Attributes:
        name: Stem of its file names.
        title: Heading.
        note: How to read it, in a sentence or two.
        frame: A table.
        figure: A figure.
        markdown: The table in a layout of its own, in place of the frame's columns and rows.
        html: The same table as HTML for the results page, with all text escaped.
        terminal: Text or rich renderable to print in the terminal; nothing by default.
        folded: Whether the results page shows it collapsed.
        files: Further files to write, name to text.
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
    """A section of the results page, which is empty if the results lack its data."""

    #: Name of the section in a grid's key ``sections``.
    name: ClassVar[str] = ""

    @abstractmethod
    def show(self, results: Results) -> Iterator[Panel]:
        """Yields the section's tables and figures, in order."""
