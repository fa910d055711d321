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
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import instructedit.analysis as analysis
from instructedit.analysis import markdown_table, rich_table

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


Part = tuple[list[str], list[list[Marked]]]  # a header, and the rows below it


def unpadded(text: str) -> str:
    return re.sub(r"(^|\[|(?<= )) +", r"\1", text)


def from_rich(group: Group) -> list[Part]:
    marks = {"": "", "bold": "best", "underline": "second", "dim": ""}
    parts = []
    for table in group.renderables:
        assert isinstance(table, Table)
        header = [column.header.plain for column in table.columns if isinstance(column.header, Text)]
        rows = zip(*([*column.cells] for column in table.columns), strict=True)
        parts.append((header, [[(unpadded(cell.plain), marks[str(cell.style)]) for cell in row] for row in rows]))
    return parts


def from_markdown(text: str) -> list[Part]:
    page = MarkdownIt("commonmark").enable("table").render(text)
    parts: list[Part] = []
    for line in page.split("</tr>")[:-1]:
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)
        if "<th>" in line:
            parts.append((cells, []))
        else:
            marks = ["best" if "<strong>" in cell else "second" if "<ins>" in cell else "" for cell in cells]
            parts[-1][1].append([*zip([re.sub(r"<.*?>", "", cell) for cell in cells], marks, strict=True)])
    return parts


def in_every_format(*args: Any, **options: Any) -> list[Part]:
    """The table, which is the same in the terminal and in Markdown."""
    parts = from_rich(rich_table(*args, **options))
    assert from_markdown(markdown_table(*args, **options)) == parts
    return parts


def wide(rows: list[tuple[str, str, list[Marked]]]) -> list[list[Marked]]:
    return [[(task, ""), (metric, ""), *cells] for task, metric, cells in rows]


def test_every_format_has_the_same_cells_and_marks() -> None:
    assert in_every_format(summary(), TITLES) == [(HEADER, wide(ROWS))]


def test_other_metrics_on_request() -> None:
    ((header, rows),) = in_every_format(summary(), metrics=["Reliability.exact", "locality"])
    assert header == HEADER
    assert [[text for text, _ in row[:2]] for row in rows] == [["zsre", "Reliability (exact)"], ["", "Locality"]]


PAPER = pd.DataFrame(
    {
        "method": ["MEND", "MEND", "GRACE"],
        "task": ["zsre", "recent", "zsre"],
        "metric": "Reliability",
        "mean": [99.96, 1, 2],
    }
)


def test_published_numbers_stand_beside_and_are_not_ranked() -> None:
    ((header, rows),) = in_every_format(summary(), TITLES, PAPER)
    assert header == [*HEADER, "MEND (paper)", "GRACE (paper)"]
    assert [row[-2:] for row in rows] == [[("–", "")] * 2, [("100.0", ""), ("2.0", "")], [("–", "")] * 2]
    assert [row[:-2] for row in rows] == wide(ROWS)


# -- the tall layout -----------------------------------------------------------------------------------------------

TALL: list[Part] = [
    (
        ["ConvSent", "Fluency"],
        [
            [("unedited", ""), ("–", "")],
            [("MEND", ""), ("602", "second")],
            [("KE", ""), ("–", "")],
            [("InstructEdit", ""), ("618 [616, 620]", "best")],
        ],
    ),
    (
        ["ZsRE (held out)", "Reliability", "Locality"],
        [
            [("unedited", ""), ("1.3 [-0.7, 3.3]", ""), ("100 [100, 100]", "")],
            [("MEND", ""), ("40.0 [38.0, 42.0]", "best"), ("93.0 [91.0, 95.0]", "second")],
            [("KE", ""), ("40.0 [38.0, 42.0]", "best"), ("–", "")],
            [("InstructEdit", ""), ("12.0 [10.0, 14.0]", "second"), ("94.5 [92.5, 96.5]", "best")],
        ],
    ),
]


def test_tall_has_a_part_for_each_task_and_a_column_for_each_of_its_metrics() -> None:
    assert in_every_format(summary(), TITLES, layout="tall") == TALL


def test_tall_published_numbers_stand_beside_their_metric() -> None:
    first, (header, rows) = in_every_format(summary(), TITLES, PAPER, layout="tall")
    assert first == TALL[0]  # nothing was published for it: no column
    assert header == ["ZsRE (held out)", "Reliability", "paper", "Locality"]
    assert [row[2] for row in rows] == [("–", ""), ("100", ""), ("–", ""), ("–", "")]  # GRACE is not among ours
    assert [row[:2] + row[3:] for row in rows] == TALL[1][1]


def test_tall_means_that_read_the_same_rank_the_same() -> None:
    names = ["A", "B", "C"]
    means = [row(name, "convsent", "fluency", mean) for name, mean in zip(names, (600.4, 599.6, 599.4), strict=True)]
    (_, rows) = in_every_format(pd.DataFrame(means), layout="tall")[0]
    assert [(text[:3], mark) for _, (text, mark) in rows] == [("600", "best"), ("600", "best"), ("599", "second")]


def test_tall_numbers_stand_below_each_other() -> None:
    group = rich_table(summary(), TITLES, layout="tall")
    (column,) = [column for table in group.renderables for column in table.columns if str(column.header) == "Locality"]  # type: ignore[union-attr]
    assert [str(cell) for cell in column.cells] == [" 100 [ 100,  100]", "93.0 [91.0, 95.0]", "–", "94.5 [92.5, 96.5]"]


def test_tall_fits_into_120_columns() -> None:
    """Thirteen methods with published numbers, all as wide as they get: no line is broken, nothing is cut."""
    methods = ["unedited", "CaliNet (trained)", *(f"method {i}" for i in range(11))]
    metrics = ["reliability", "generalization", "locality", "portability"]
    rows = [row(name, task, metric, 94.1) for name in methods for task in TITLES for metric in metrics]
    rows += [row(name, "convsent", "fluency", 617.65) for name in methods]
    table = pd.DataFrame([each for each in rows if (each["task"], each["metric"]) != ("convsent", "portability")])
    console = Console(width=120, file=StringIO())
    console.print(rich_table(table, TITLES, table[["method", "task", "metric", "mean"]], layout="tall"))
    lines = [line.strip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    cells = "94.1 [92.1, 96.1]  94.1"
    assert lines.count("CaliNet (trained)  " + "  ".join([cells] * 4)) == 1, lines
    assert sum(cells in line for line in lines) == 26


def test_two_rows_for_one_cell_are_refused() -> None:
    twice = pd.concat([summary(), summary().head(1).assign(metric="Locality")])
    with pytest.raises(ValueError, match="two rows for unedited, zsre, locality"):
        markdown_table(twice)


def test_names_are_text_and_not_markup() -> None:
    name = r"a|b_*c*_[d] 100% & {e} <f> \g"
    table = pd.DataFrame([row(name, "zsre", "locality", 1.0)])
    assert from_rich(rich_table(table))[0][0][-1] == name
    assert from_markdown(markdown_table(table))[0][0][-1] == name.replace("&", "&amp;").replace("<f>", "&lt;f&gt;")


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
