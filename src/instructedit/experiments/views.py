"""Deprecated names of sections from before 0.2: `View` is now `Section`, and `Shown` is now `Panel`."""

from __future__ import annotations

import warnings

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel as Shown
from instructedit.experiments.sections.base import Section as View

__all__ = ["Results", "Shown", "View"]

warnings.warn(
    "instructedit.experiments.views: import Section (once View) and Panel (once Shown) from "
    "instructedit.experiments.sections",
    DeprecationWarning,
    stacklevel=2,
)
