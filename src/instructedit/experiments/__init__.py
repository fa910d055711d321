"""Experiments: the rows of a grid, each fitted and tested by the same command line, put side by side."""

from instructedit.experiments.experiment import Experiment
from instructedit.experiments.grid import REPOSITORY, Grid, Row, Scale, Search

__all__ = ["REPOSITORY", "Experiment", "Grid", "Row", "Scale", "Search"]
