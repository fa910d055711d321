"""Sections of the results page, one in each file, found by their names."""

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import PACKAGE, Panel, Section

__all__ = ["PACKAGE", "Panel", "Results", "Section"]
