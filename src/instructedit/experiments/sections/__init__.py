"""What a results page consists of: one section a file, found by its name."""

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import PACKAGE, Panel, Section

__all__ = ["PACKAGE", "Panel", "Results", "Section"]
