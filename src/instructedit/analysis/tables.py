"""Result tables with intervals, for the terminal, Markdown and HTML, in two layouts.

``wide`` is the layout of the paper's Table 3: a row for each task and metric, a column for each method. ``tall`` is for
many methods: a part for each task, with a row for each method and a column for each metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from instructedit.metrics import headline_metrics, metric_title

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

#: The method name of the model before any edit. Its locality is 100 by definition, so it is left out of rankings.
UNEDITED = "unedited"

Layout = Literal["wide", "tall"]

_PAPER = "paper"
_MARKDOWN_SPECIAL = re.compile(r"([\\|*_`<>\[\]])")

_Values = dict[tuple[str, str, str], tuple[float, ...]]  # (method, task, metric) to (mean, low, high)
_TaskMetrics = dict[tuple[str, str], list[str]]  # (task, its title) to its metrics


class _Mark(Enum):
    """The rank of a mean among the methods, or the mark of a published number."""

    BEST = "best"
    SECOND = "second"
    NONE = "none"
    PUBLISHED = "published"


@dataclass(frozen=True)
class _Cell:
    text: str = "–"
    mark: _Mark = _Mark.NONE


@dataclass(frozen=True)
class _Row:
    names: list[str]
    cells: list[_Cell]
    section: bool = False  # True if a section begins here


@dataclass(frozen=True)
class _Part:
    """Rows under one header."""

    header: list[str]
    rows: list[_Row]
    names: int  # columns that hold names; the others hold cells

    def widths(self) -> Iterable[int]:
        """Returns the width of each column in characters, with its numbers aligned."""
        lines = [self.header, *([*row.names, *(_aligned(cell.text) for cell in row.cells)] for row in self.rows)]
        return (max(map(len, column)) for column in zip(*lines, strict=True))


def rich_table(
    summary: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    baselines: pd.DataFrame | None = None,
    metrics: Sequence[str] | None = None,
    layout: Layout = "wide",
) -> Group:
    """Builds a result table for the terminal.

    A cell reads ``83.2 [80.1, 86.0]``, mean and interval. The best mean of a task and metric is bold, the next one
    underlined; means that are printed alike rank alike. The unedited model and published numbers are not ranked.

    Args:
        summary: One row for each ``method``, ``task`` and ``metric``, with ``mean``, ``low`` and ``high`` (x 100).
        titles: Task name to its title in the table; tasks appear in this order, others follow.
        baselines: Published numbers, with the columns ``method``, ``task``, ``metric`` and ``mean``, for the summary's
            tasks and metrics. Wide: columns at the right, headed ``… (paper)``. Tall: a column ``paper`` beside each
            metric, for the summary's methods.
        metrics: The metrics to show, in order, in upper or lower case; higher is taken to be better for all of them.
        layout: ``wide`` or ``tall``. Tall numbers from 100 on have no decimal, so that 120 columns are enough.

    Raises:
        ValueError: If a method has two rows for one task and metric.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {_Mark.BEST: "bold", _Mark.SECOND: "underline", _Mark.NONE: "", _Mark.PUBLISHED: "dim"}
    parts = _parts(summary, titles, baselines, metrics, layout)
    tall = layout == "tall"
    widths = [max(widths) for widths in zip_longest(*(part.widths() for part in parts), fillvalue=0)]
    tables = []
    for part in parts:
        # Tall: all parts have equal column widths, and a published number stands closer to its own metric.
        table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, padding=(0, 0 if tall else 1))
        for position, name in enumerate(part.header):
            left = position < part.names
            min_width = widths[position] + (not left and name != _PAPER) if tall else None
            justify: Literal["left", "right"] = "left" if left else "right"
            table.add_column(Text(name), justify=justify, no_wrap=left or tall, min_width=min_width)
        for row in part.rows:
            if row.section:
                table.add_section()
            texts = (_aligned(cell.text) if tall else cell.text for cell in row.cells)
            cells = (Text(text, styles[cell.mark]) for text, cell in zip(texts, row.cells, strict=True))
            table.add_row(*map(Text, row.names), *cells)
        tables.append(table)
    return Group(*tables)


def markdown_table(
    summary: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    baselines: pd.DataFrame | None = None,
    metrics: Sequence[str] | None = None,
    layout: Layout = "wide",
) -> str:
    """Formats the table of ``rich_table`` as GitHub Markdown, underlined with ``<ins>``; one table for each part."""
    styles = {_Mark.BEST: "**{}**", _Mark.SECOND: "<ins>{}</ins>", _Mark.NONE: "{}", _Mark.PUBLISHED: "{}"}

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    tables = []
    for part in _parts(summary, titles, baselines, metrics, layout):
        rules = ["---"] * part.names + ["---:"] * (len(part.header) - part.names)
        lines = [line(map(_markdown, part.header)), line(rules)]
        for row in part.rows:
            cells = (styles[cell.mark].format(cell.text) for cell in row.cells)
            lines.append(line([*map(_markdown, row.names), *cells]))
        tables.append("".join(lines))
    return "\n".join(tables)


def html_table(
    summary: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    baselines: pd.DataFrame | None = None,
    metrics: Sequence[str] | None = None,
    layout: Layout = "wide",
) -> str:
    """Formats the table of ``rich_table`` as HTML with all text escaped: one ``table`` for each part.

    Intervals are in ``small``, the best means in ``b`` and the second best in ``u``; cells with published means have
    the class ``paper``.
    """
    tags = {_Mark.BEST: "<b>{}</b>", _Mark.SECOND: "<u>{}</u>", _Mark.NONE: "{}", _Mark.PUBLISHED: "{}"}

    def cell(value: _Cell) -> str:
        mean, _, interval = value.text.partition(" ")
        kind = ' class="paper"' if value.mark is _Mark.PUBLISHED else ""
        rest = f" <small>{escape(interval)}</small>" if interval else ""
        return f"<td{kind}>{tags[value.mark].format(escape(mean))}{rest}</td>"

    tables = []
    for part in _parts(summary, titles, baselines, metrics, layout):
        header = "".join(f"<th>{escape(name)}</th>" for name in part.header)
        lines = [f"<table class='names-{part.names}'>", f"<thead><tr>{header}</tr></thead>", "<tbody>"]
        for row in part.rows:
            names = "".join(f"<th>{escape(name)}</th>" for name in row.names)
            kind = ' class="section"' if row.section else ""
            lines.append(f"<tr{kind}>{names}{''.join(map(cell, row.cells))}</tr>")
        tables.append("\n".join([*lines, "</tbody>", "</table>"]))
    return "\n".join(tables)


def in_order(names: Iterable[str], first: Iterable[str]) -> list[str]:
    """Returns each name once: those in ``first`` in its order, then the others in order of appearance."""
    present = dict.fromkeys(names)
    return [name for name in dict.fromkeys([*first, *present]) if name in present]


def _parts(
    summary: pd.DataFrame,
    titles: Mapping[str, str] | None,
    baselines: pd.DataFrame | None,
    metrics: Sequence[str] | None,
    layout: Layout,
) -> list[_Part]:
    """Arranges the results in the parts that all output formats share."""
    metrics = headline_metrics() if metrics is None else metrics
    titles = titles or {}
    ours = _values(summary)
    published = {} if baselines is None else _values(baselines)
    task_metrics: _TaskMetrics = {}
    for task in in_order((task for _, task, _ in ours), titles):
        present = {metric for _, its, metric in ours if its == task}
        if own := [name.lower() for name in metrics if name.lower() in present]:
            task_metrics[task, titles.get(task, task)] = own
    return (_tall if layout == "tall" else _wide)(task_metrics, ours, published)


def _wide(task_metrics: _TaskMetrics, ours: _Values, published: _Values) -> list[_Part]:
    methods, others = _methods(ours), _methods(published)
    rows = []
    for (task, title), metrics in task_metrics.items():
        for metric in metrics:
            first = metric == metrics[0]
            cells = _ranked(ours, methods, task, metric) + _published(published, others, task, metric)
            rows.append(_Row([title if first else "", metric_title(metric)], cells, section=first))
    return [_Part(["Task", "Metric", *methods, *(f"{method} ({_PAPER})" for method in others)], rows, names=2)]


def _tall(task_metrics: _TaskMetrics, ours: _Values, published: _Values) -> list[_Part]:
    methods = _methods(ours)
    parts = []
    for (task, title), metrics in task_metrics.items():
        header, columns = [title], []
        for metric in metrics:
            header.append(metric_title(metric))
            columns.append(_ranked(ours, methods, task, metric, short=True))
            if any((method, task, metric) in published for method in methods):
                header.append(_PAPER)
                columns.append(_published(published, methods, task, metric, short=True))
        rows = [_Row([method], list(cells)) for method, *cells in zip(methods, *columns, strict=True)]
        rows[0] = _Row(rows[0].names, rows[0].cells, section=True)
        parts.append(_Part(header, rows, names=1))
    return parts


def _values(frame: pd.DataFrame) -> _Values:
    """Returns the mean and, where the frame has them, the bounds of each row, with metrics in lower case."""
    frame = frame.assign(metric=frame["metric"].str.lower())
    keys, columns = ["method", "task", "metric"], [name for name in ("mean", "low", "high") if name in frame]
    if frame.duplicated(keys).any():
        raise ValueError(f"two rows for {', '.join(map(str, frame.loc[frame.duplicated(keys), keys].iloc[0]))}")
    names, values = (frame[part].itertuples(index=False, name=None) for part in (keys, columns))
    return dict(zip(names, values, strict=True))


def _methods(values: _Values) -> list[str]:
    return list(dict.fromkeys(method for method, *_ in values))


def _ranked(values: _Values, methods: list[str], task: str, metric: str, short: bool = False) -> list[_Cell]:
    """Returns a cell for each method, with the best and second-best mean marked."""
    found = [values.get((method, task, metric), (math.nan,)) for method in methods]
    # Ranked by the rounded means: a difference that the table does not show should not decide what it highlights.
    shown = [float(_number(mean, short)) for mean, *_ in found]
    ranked = [math.nan if method == UNEDITED else mean for method, mean in zip(methods, shown, strict=True)]
    best = sorted({mean for mean in ranked if not math.isnan(mean)}, reverse=True)
    marks = dict(zip(best, (_Mark.BEST, _Mark.SECOND), strict=False))
    return [_Cell(_text(value, short), marks.get(mean, _Mark.NONE)) for value, mean in zip(found, ranked, strict=True)]


def _published(values: _Values, methods: list[str], task: str, metric: str, short: bool = False) -> list[_Cell]:
    """Returns a cell for each method, marked as published."""
    found = (values.get((method, task, metric), (math.nan,)) for method in methods)
    return [_Cell(_text(value, short), _Mark.PUBLISHED) for value in found]


def _text(value: Sequence[float], short: bool) -> str:
    mean, *interval = value
    if math.isnan(mean):
        return "–"
    if not interval or any(map(math.isnan, interval)):
        return _number(mean, short)
    return f"{_number(mean, short)} [{', '.join(_number(end, short) for end in interval)}]"


def _number(value: float, short: bool) -> str:
    """Formats a number with one decimal; if ``short``, with none from 100 on."""
    text = f"{value:.1f}"
    return f"{value:.0f}" if short and abs(float(text)) >= 100 else text


def _aligned(text: str) -> str:
    """Pads every number to the width of ``94.1``, so that the numbers of a column line up."""
    return re.sub(r"[-\d.]+", lambda number: number[0].rjust(4), text)


def _markdown(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", text)
