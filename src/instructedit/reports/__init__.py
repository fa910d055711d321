"""Reports of edits: whether each took, failed, or spread to unrelated prompts."""

from instructedit.reports.cases import EditCase, read_cases
from instructedit.reports.making import edit
from instructedit.reports.report import Answer, EditReport, RequestReport, Verdict

__all__ = ["Answer", "EditCase", "EditReport", "RequestReport", "Verdict", "edit", "read_cases"]
