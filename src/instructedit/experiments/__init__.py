"""Experiments: the rows of a grid, each fitted and tested by the same command line, with their results compared."""

from instructedit.experiments.experiment import Experiment
from instructedit.experiments.spec import Grid, Row, Search

__all__ = ["Experiment", "Grid", "Row", "Search"]
