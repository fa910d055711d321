"""The report of edits as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from instructedit.reports.report import EditReport, RequestReport
from instructedit.reports.words import change, drift_line, number, one_line

#: With more requests than this, each has a line instead of a table.
_SHOWN = 3
_STYLES = {"failed": "bold red", "spread": "bold yellow", "took": "bold green"}


def tables(report: EditReport) -> Iterator[RenderableType]:
    """Yields what to print; texts of the user and the model are shown verbatim, including square brackets."""
    if len(report.requests) <= _SHOWN:
        for each in report.requests:
            yield from _detailed(each)
    else:
        yield _one_line_each(report)
    if len(report.requests) > 1:
        yield Text(report.headline(), "bold")
    if report.advice:
        yield Text(f"for what failed, try {report.advice}")


def _detailed(report: RequestReport) -> Iterator[RenderableType]:
    yield Text(f"{report.request.prompt} → {report.request.target}", "bold")
    table = _table("", "prompt", "before", "after", numbers=("p per token", "rank"))
    for answer in report.answers:
        words = (answer.title, answer.prompt, one_line(answer.before.words), one_line(answer.after.words))
        numbers = (
            change(answer.before.token_probability, answer.after.token_probability),
            change(answer.before.rank, answer.after.rank),
        )
        table.add_row(*map(Text, (*words, *numbers)), style="yellow" if answer.spread else None)
    yield table
    own = report.answers[0]
    whole = change(own.before.probability, own.after.probability)
    yield _verdict(report)
    yield Text(f"p of the whole target {whole}; {drift_line(report.drift)}", "dim")


def _one_line_each(report: EditReport) -> Table:
    table = _table("request", "after", "verdict", numbers=("p per token", "rank", "KL"))
    for each in report.requests:
        own = each.answers[0]
        table.add_row(
            Text(f"{each.request.prompt} → {each.request.target}"), Text(one_line(own.after.words)), _verdict(each),
            change(own.before.token_probability, own.after.token_probability), change(own.before.rank, own.after.rank),
            number(each.drift.kl),
        )  # fmt: skip
    return table


def _table(*words: str, numbers: tuple[str, ...]) -> Table:
    table = Table(*words)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _verdict(report: RequestReport) -> Text:
    return Text(str(report.verdict), _STYLES[report.verdict.kind])
