"""What the sections make of results, on tables made by hand."""

from __future__ import annotations

import math
from io import StringIO

import pandas as pd
import pytest
from rich.console import Console

from instructedit.analysis.summary import holm
from instructedit.experiments.runner import RunResult
from instructedit.experiments.sections import PACKAGE, Results, Section
from instructedit.experiments.sections.differences import DifferencesSection
from instructedit.experiments.sections.failures import FailuresSection, worst
from instructedit.experiments.sections.table import TableSection
from instructedit.experiments.spec import Grid, Row
from instructedit.registry import plugins


def probes(accuracy, task="zsre", **columns):
    """A request for each record, asked behind an instruction, with the model's words."""
    names = [f"{task}/{i}" for i in range(len(accuracy))]
    table = pd.DataFrame({"record": names, "cluster": names, "accuracy": accuracy, "task": task, "probe": 0})
    table = table.assign(kind="reliability", group="", view="instructed", main=True, agreement=math.nan)
    table = table.assign(prompt=[f"Task: x\nInput: question {n}" for n in names], answer="Lyon", before="Paris")
    return table.assign(after="Rome", generated=0.0, accuracy_before=0.25, **columns)


def results(rows, compare=(), **options):
    """Of rows to the tables of their seeds."""
    grid = Grid("A try", (1,), {name: Row("mend") for name in rows}, compare=tuple(compare), **options)
    children = {
        name: [RunResult(f"run{seed}", seed, table, None, {"zsre": "ZsRE"}, None) for seed, table in enumerate(tables)]
        for name, tables in rows.items()
    }
    return Results("try", grid, "one", children, None, {"zsre": "ZsRE", "recent": "Recent"})


def test_sections_without_results_show_nothing():
    empty = Results("try", Grid("A try", (1,), {}), "one", {}, None, {})
    own = ("table", "differences", "metrics", "areas", "search", "failures")
    assert {name: list(plugins(Section, PACKAGE)[name]().show(empty)) for name in own} == {key: [] for key in own}


def test_differences_are_corrected_for_all_comparisons():
    a, b, c = probes([1.0, 0.9, 0.8, 0.7, 1.0]), probes([0.1, 0.2, 0.3, 0.4, 0.0]), probes([0.9, 0.9, 0.9, 0.7, 0.9])
    found = results({"A": [a], "B": [b], "C": [c]}, compare=[("A", "B"), ("A", "C"), ("A", "gone")])
    (shown,) = DifferencesSection().show(found)
    frame = shown.frame
    assert frame[["method", "baseline", "task"]].to_numpy().tolist() == [["A", "B", "ZsRE"], ["A", "C", "ZsRE"]]
    assert frame["p_holm"].tolist() == pytest.approx(holm(frame["p_value"].tolist()))
    assert frame["p_holm"][0] == pytest.approx(2 * frame["p_value"][0])
    assert "all 2 comparisons" in shown.note
    sure = frame["p_holm"] < 0.05
    assert sure.tolist() == [True, False]  # so that the star below says something
    text = StringIO()
    Console(file=text, width=120).print(shown.terminal)
    (starred,) = [line for line in text.getvalue().splitlines() if "]*" in line]
    assert f"{frame['mean'][0]:+.1f} [{frame['low'][0]:+.1f}, {frame['high'][0]:+.1f}]*" in starred


def test_the_spread_of_seeds_stands_beside_the_table():
    found = results({"A": [probes([1.0, 0.0]), probes([1.0, 1.0])], "B": [probes([0.5, 0.5])]})
    shown = {each.name: each for each in TableSection().show(found)}
    assert list(shown) == ["table", "spread", "summary"]
    spread = shown["spread"].frame
    assert spread["A"].item() == pytest.approx(100 * math.sqrt(0.125))  # of 0.5 and 1
    assert "B" not in spread
    assert "a record's 2 seeds averaged first" in shown["table"].note
    assert "spread" not in {each.name for each in TableSection().show(results({"B": [probes([0.5])]}))}


def test_the_html_table_says_what_the_markdown_says():
    evil = results({"A <b>": [probes([1.0, 0.0])], "B": [probes([0.5, 0.25])]})
    shown = next(iter(TableSection().show(evil)))
    assert "<th>A &lt;b&gt;</th>" in shown.html
    (line,) = [text for text in shown.markdown.splitlines() if "Reliability" in text and "ZsRE" in text]
    for cell in line.split(" | ")[2:]:
        mean = cell.strip("*<ins>/ |").split(" ")[0]
        assert mean in shown.html


def test_failures_are_chosen_by_the_rule():
    """Lowest mean in-scope accuracy first, ties by record id, records that went well not at all."""
    table = probes([0.5, 0.0, 1.0, 0.5, 0.75])
    other = table.iloc[[0]].assign(kind="generalization", probe=1, accuracy=0.3, after="Nice", before=None)
    plain = table.assign(view="plain", main=False, accuracy=0.0)
    found = worst(pd.concat([table, other, plain], ignore_index=True), records=3)
    assert found["record"].tolist() == ["zsre/1", "zsre/0", "zsre/3"]
    assert found["accuracy"].tolist() == pytest.approx([0.0, 40.0, 50.0])  # 0.4 is the mean of 0.5 and 0.3
    assert found["probe"].tolist() == ["reliability", "generalization", "reliability"]
    assert found["after"].tolist() == ["Rome", "Nice", "Rome"]
    assert found["prompt"].tolist()[0] == "Input: question zsre/1"
    assert worst(table, records=9)["record"].tolist() == ["zsre/1", "zsre/0", "zsre/3", "zsre/4"]


def test_failures_of_each_row_and_task():
    both = pd.concat([probes([0.5, 0.0]), probes([0.1], task="recent")], ignore_index=True)
    still = both.assign(accuracy=both["accuracy_before"])
    silent = both.drop(columns=["generated", "after", "before"])
    (shown,) = FailuresSection().show(results({"A": [both], "unedited": [still], "silent": [silent]}))
    assert shown.frame[["row", "task", "record"]].to_numpy().tolist() == [
        ["A", "ZsRE", "zsre/1"], ["A", "ZsRE", "zsre/0"], ["A", "Recent", "recent/0"],
    ]  # fmt: skip
    (shown,) = FailuresSection().show(results({"A": [both]}, options={"failures": {"records": 1}}))
    assert shown.frame["record"].tolist() == ["zsre/1", "recent/0"]
