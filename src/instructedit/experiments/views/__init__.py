"""What is looked at when an experiment is through: one view a file, found by its name."""

from instructedit.experiments.views.base import PACKAGE, Results, Shown, View

__all__ = ["PACKAGE", "Results", "Shown", "View"]
