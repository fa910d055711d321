"""Result tables: the same cells in every format, what is stressed, and names that need escaping."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from io import StringIO
from typing import Any

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table
from rich.text import Text

import instructedit.analysis as analysis
from instructedit.analysis import latex_table, markdown_table, rich_table

Marked = tuple[str, str]  # a cell's text, and how it is stressed


def row(method: str, task: str, metric: str, mean: float, margin: float = 2.0) -> dict[str, Any]:
    return {"method": method, "task": task, "metric": metric, "mean": mean, "low": mean - margin, "high": mean + margin}


def summary() -> pd.DataFrame:
    """Three methods, two tasks; out of order, with a tie, a gap, a mean without interval and a further metric."""
    return pd.DataFrame(
        [
            row("unedited", "zsre", "locality", 100, 0),
            row("unedited", "zsre", "reliability", 1.26),
            row("MEND", "zsre", "locality", 93.04),
            row("MEND", "zsre", "reliability", 40.0),
            row("MEND", "zsre", "reliability.exact", 30.0),
            row("MEND", "convsent", "fluency", 601.93, math.nan),
            row("KE", "zsre", "reliability", 39.96),
            row("KE", "zsre", "locality", math.nan),
            row("InstructEdit", "zsre", "reliability", 12.0),
            row("InstructEdit", "zsre", "locality", 94.5),
            row("InstructEdit", "convsent", "fluency", 617.65),
        ]
    )


HEADER = ["Task", "Metric", "unedited", "MEND", "KE", "InstructEdit"]
TITLES = {"convsent": "ConvSent", "zsre": "ZsRE (held out)"}
ROWS: list[tuple[str, str, list[Marked]]] = [
    ("ConvSent", "Fluency", [("–", ""), ("601.9", "second"), ("–", ""), ("617.6 [615.6, 619.6]", "best")]),
    (
        "ZsRE (held out)",
        "Reliability",
        [
            ("1.3 [-0.7, 3.3]", ""),
            ("40.0 [38.0, 42.0]", "best"),
            ("40.0 [38.0, 42.0]", "best"),
            ("12.0 [10.0, 14.0]", "second"),
        ],
    ),
    (
        "",
        "Locality",
        [
            ("100.0 [100.0, 100.0]", ""),
            ("93.0 [91.0, 95.0]", "second"),
            ("–", ""),
            ("94.5 [92.5, 96.5]", "best"),
        ],
    ),
]


def from_rich(table: Table) -> tuple[list[str], list[tuple[str, str, list[Marked]]]]:
    marks = {"": "", "bold": "best", "underline": "second"}
    columns: list[list[Any]] = [list(column.cells) for column in table.columns]
    rows = []
    for task, metric, *cells in zip(*columns, strict=True):
        rows.append((task.plain, metric.plain, [(cell.plain, marks[str(cell.style)]) for cell in cells]))
    return [header.plain for header in (column.header for column in table.columns) if isinstance(header, Text)], rows


def from_markdown(text: str) -> tuple[list[str], list[tuple[str, str, list[Marked]]]]:
    page = MarkdownIt("commonmark").enable("table").render(text)
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in page.split("</tr>")[:-1]]

    def marked(cell: str) -> Marked:
        mark = "best" if "<strong>" in cell else "second" if "<ins>" in cell else ""
        return re.sub(r"<.*?>", "", cell), mark

    return lines[0], [(task, metric, [marked(cell) for cell in cells]) for task, metric, *cells in lines[1:]]


def from_latex(text: str) -> tuple[list[str], list[tuple[str, str, list[Marked]]]]:
    lines = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r" \\")]

    def marked(cell: str) -> Marked:
        mark = "best" if cell.startswith(r"\textbf") else "second" if cell.startswith(r"\underline") else ""
        return re.sub(r"\\\w+\{(.*)\}", r"\1", cell).replace("--", "–"), mark

    header, *rows = [[cell.strip() for cell in line] for line in lines]
    return header, [(task, metric, [marked(cell) for cell in cells]) for task, metric, *cells in rows]


def test_every_format_has_the_same_cells_and_marks() -> None:
    assert from_rich(rich_table(summary(), TITLES)) == (HEADER, ROWS)
    assert from_markdown(markdown_table(summary(), TITLES)) == (HEADER, ROWS)
    assert from_latex(latex_table(summary(), TITLES)) == (HEADER, ROWS)


def test_other_metrics_on_request() -> None:
    header, rows = from_markdown(markdown_table(summary(), metrics=["Reliability.exact", "locality"]))
    assert header == HEADER
    assert [(task, metric) for task, metric, _ in rows] == [("zsre", "Reliability (exact)"), ("", "Locality")]


def test_published_numbers_stand_beside_and_are_not_ranked() -> None:
    paper = pd.DataFrame(
        {"method": ["MEND"] * 2, "task": ["zsre", "recent"], "metric": ["Reliability"] * 2, "mean": [99.9, 1.0]}
    )
    header, rows = from_markdown(markdown_table(summary(), TITLES, paper))
    assert header == [*HEADER, "MEND (paper)"]
    assert [cells[-1] for *_, cells in rows] == [("–", ""), ("99.9", ""), ("–", "")]
    assert [(task, metric, cells[:-1]) for task, metric, cells in rows] == ROWS


def test_two_rows_for_one_cell_are_refused() -> None:
    twice = pd.concat([summary(), summary().head(1).assign(metric="Locality")])
    with pytest.raises(ValueError, match="two rows for unedited, zsre, locality"):
        markdown_table(twice)


def test_names_are_text_and_not_markup() -> None:
    name = r"a|b_*c*_[d] 100% & {e} <f> \g"
    table = pd.DataFrame([row(name, "zsre", "locality", 1.0)])
    assert from_rich(rich_table(table))[0][-1] == name
    assert from_markdown(markdown_table(table))[0][-1] == name.replace("&", "&amp;").replace("<f>", "&lt;f&gt;")
    assert r"a|b\_*c*\_[d] 100\% \& \{e\} <f> \textbackslash{}g" in latex_table(table)


def test_the_terminal_shows_sections() -> None:
    console = Console(width=120, file=StringIO())
    console.print(rich_table(summary(), TITLES))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("617.6 [615.6, 619.6]" in line for line in lines)
    first, second = (next(i for i, line in enumerate(lines) if name in line) for name in TITLES.values())
    assert second == first + 2
    assert not lines[first + 1].strip()


def test_public_names_are_there_and_imported_late() -> None:
    for name in analysis.__all__:
        assert getattr(analysis, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = analysis.nothing
    heavy = "{'torch', 'sklearn', 'seaborn', 'matplotlib', 'pandas'}"
    code = f"import sys, instructedit.analysis.tables; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
