"""The report of edits as one HTML page."""

from __future__ import annotations

from pathlib import Path

from instructedit.pages import render
from instructedit.reports.report import EditReport
from instructedit.reports.words import change, drift_line, headline, role_title

_TEMPLATE = Path(__file__).with_name("page.html")


def page(report: EditReport) -> str:
    """Renders the page; all text of the user, the model and the method is escaped."""
    options = ", ".join(f"{name}={value}" for name, value in report.options.items() if value is not None)
    facts = [("model", report.lm), ("editor", report.editor), ("options", options or "none"), ("text", report.text)]
    return render(
        _TEMPLATE, title=headline(report), facts=facts, advice=report.advice, joint=report.joint,
        requests=[(each, drift_line(each.drift)) for each in report.requests], change=change, role_title=role_title,
    )  # fmt: skip
