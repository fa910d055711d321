"""Result tables with intervals, in the layout of the paper's Table 3: for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

#: The paper's metrics in the order of its Table 3; each of them is the higher, the better.
METRICS = ("reliability", "generalization", "locality", "portability", "fluency")

#: The method name of the model before any edit. It keeps its own locality at 100, so it takes no part in a ranking.
UNEDITED = "unedited"

_MARKDOWN_SPECIAL = re.compile(r"([\\|*_`<>\[\]])")
_LATEX_SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
}


class _Mark(Enum):
    """How a mean ranks in its row."""

    BEST = "best"
    SECOND = "second"
    NONE = "none"


@dataclass(frozen=True)
class _Cell:
    text: str = "–"
    mark: _Mark = _Mark.NONE


@dataclass(frozen=True)
class _Row:
    task: str  # empty below the first row of a task
    metric: str
    cells: list[_Cell]


def rich_table(
    summary: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    baselines: pd.DataFrame | None = None,
    metrics: Sequence[str] = METRICS,
) -> Table:
    """Table for the terminal: one row for each task and metric, one column for each method.

    A cell reads ``83.2 [80.1, 86.0]``, mean and interval. The best mean of a row is bold, the next one underlined;
    means that read the same rank the same. The unedited model and published numbers take no part in that.

    Args:
        summary: One row for each ``method``, ``task`` and ``metric``, with ``mean``, ``low`` and ``high`` (x 100).
        titles: Task name to what the table calls it; its order is the order of the tasks, others follow.
        baselines: Published numbers, with the columns ``method``, ``task``, ``metric`` and ``mean``; they stand at the
            right, headed ``… (paper)``, for the summary's tasks and metrics.
        metrics: The metrics to show, in order, whatever their case; all of them are the higher, the better.

    Raises:
        ValueError: If a method has two rows for one task and metric.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    styles = {_Mark.BEST: "bold", _Mark.SECOND: "underline", _Mark.NONE: ""}
    header, rows = _grid(summary, titles, baselines, metrics)
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for position, name in enumerate(header):
        table.add_column(Text(name), justify="left" if position < 2 else "right", no_wrap=position < 2)
    for row in rows:
        if row.task:
            table.add_section()
        cells = (Text(cell.text, styles[cell.mark]) for cell in row.cells)
        table.add_row(Text(row.task), Text(row.metric), *cells)
    return table


def markdown_table(
    summary: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    baselines: pd.DataFrame | None = None,
    metrics: Sequence[str] = METRICS,
) -> str:
    """The table of ``rich_table`` in GitHub's Markdown, underlined with ``<ins>``."""
    styles = {_Mark.BEST: "**{}**", _Mark.SECOND: "<ins>{}</ins>", _Mark.NONE: "{}"}
    header, rows = _grid(summary, titles, baselines, metrics)

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line(map(_markdown, header)), line(["---", "---"] + ["---:"] * (len(header) - 2))]
    for row in rows:
        cells = (styles[cell.mark].format(cell.text) for cell in row.cells)
        lines.append(line([_markdown(row.task), _markdown(row.metric), *cells]))
    return "\n".join(lines) + "\n"


def latex_table(
    summary: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    baselines: pd.DataFrame | None = None,
    metrics: Sequence[str] = METRICS,
) -> str:
    """The table of ``rich_table`` as a LaTeX ``tabular``; it needs the package booktabs."""
    styles = {_Mark.BEST: r"\textbf{{{}}}", _Mark.SECOND: r"\underline{{{}}}", _Mark.NONE: "{}"}
    header, rows = _grid(summary, titles, baselines, metrics)
    lines = [rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}", r"\toprule"]
    lines += [" & ".join(map(_latex, header)) + r" \\"]
    for row in rows:
        if row.task:
            lines.append(r"\midrule")
        cells = (styles[cell.mark].format(_latex(cell.text)) for cell in row.cells)
        lines.append(" & ".join([_latex(row.task), _latex(row.metric), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def in_order(names: Iterable[str], first: Iterable[str]) -> list[str]:
    """Each name once: those in ``first`` in its order, then the others as they come."""
    present = dict.fromkeys(names)
    return [name for name in dict.fromkeys([*first, *present]) if name in present]


def metric_title(name: str) -> str:
    """``reliability.exact`` as ``Reliability (exact)``."""
    head, _, rest = name.partition(".")
    return head.capitalize() + f" ({rest.replace('.', ', ')})" * bool(rest)


def _grid(
    summary: pd.DataFrame, titles: Mapping[str, str] | None, baselines: pd.DataFrame | None, metrics: Sequence[str]
) -> tuple[list[str], list[_Row]]:
    """The header and the rows that all formats share."""
    titles = titles or {}
    ours = _values(summary)
    published = {} if baselines is None else _values(baselines)
    methods, others = (list(dict.fromkeys(method for method, *_ in values)) for values in (ours, published))
    rows = []
    for task in in_order((task for _, task, _ in ours), titles):
        title = titles.get(task, task)
        for metric in [name.lower() for name in metrics if any(key[1:] == (task, name.lower()) for key in ours)]:
            ranked = _ranked(methods, [ours.get((method, task, metric), (math.nan,)) for method in methods])
            quoted = [_Cell(_text(*published.get((method, task, metric), (math.nan,)))) for method in others]
            rows.append(_Row(title, metric_title(metric), ranked + quoted))
            title = ""
    return ["Task", "Metric", *methods, *(f"{method} (paper)" for method in others)], rows


def _values(frame: pd.DataFrame) -> dict[tuple[str, str, str], tuple[float, ...]]:
    """(method, task, metric in lower case) to (mean, low, high), as far as the frame has them."""
    frame = frame.assign(metric=frame["metric"].str.lower())
    keys, columns = ["method", "task", "metric"], [name for name in ("mean", "low", "high") if name in frame]
    if frame.duplicated(keys).any():
        raise ValueError(f"two rows for {', '.join(map(str, frame.loc[frame.duplicated(keys), keys].iloc[0]))}")
    names, values = (frame[part].itertuples(index=False, name=None) for part in (keys, columns))
    return dict(zip(names, values, strict=True))


def _ranked(methods: list[str], values: list[tuple[float, ...]]) -> list[_Cell]:
    # Ranked as shown: a difference that the table does not show should not decide what it stresses.
    pairs = list(zip(methods, values, strict=True))
    shown = [math.nan if method == UNEDITED else round(value[0], 1) for method, value in pairs]
    best = sorted({mean for mean in shown if not math.isnan(mean)}, reverse=True)
    marks = dict(zip(best, (_Mark.BEST, _Mark.SECOND), strict=False))
    return [_Cell(_text(*value), marks.get(mean, _Mark.NONE)) for (_, value), mean in zip(pairs, shown, strict=True)]


def _text(mean: float, low: float = math.nan, high: float = math.nan) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}" if math.isnan(low) or math.isnan(high) else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _markdown(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", text)


def _latex(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(char, char) for char in text)
