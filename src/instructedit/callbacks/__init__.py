"""Lightning callbacks, one concern in each file: guards, data reports, result tables, editing areas and others."""

from instructedit.callbacks.areas import EditingAreaDump
from instructedit.callbacks.data_report import DataReport
from instructedit.callbacks.edit_rates import EditRateSweep
from instructedit.callbacks.guards import Guards
from instructedit.callbacks.pace import Pace
from instructedit.callbacks.predictions import PredictionTable
from instructedit.callbacks.results import ResultTables
from instructedit.callbacks.tested_editor import TestedEditor

__all__ = [
    "DataReport", "EditRateSweep", "EditingAreaDump", "Guards", "Pace", "PredictionTable", "ResultTables",
    "TestedEditor",
]  # fmt: skip
