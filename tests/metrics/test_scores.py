"""What is declared as a metric: its values by hand, and that one new declaration reaches every reader of them."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

import instructedit.metrics
from instructedit.analysis import metric_bars, metric_dots
from instructedit.analysis.summary import compare, metric_values, summarise
from instructedit.analysis.tables import markdown_table
from instructedit.metrics import EditingMetric, editing_metrics, headline_metrics, metric_title

README = Path(__file__).parents[2] / "README.md"


def row(record: str, kind: str, **scores: object) -> dict[str, object]:
    defaults = {"task": "t", "cluster": record, "group": "", "view": "instructed", "main": True}
    return defaults | {"record": record, "kind": kind} | scores


ROWS = pd.DataFrame(
    [
        row("a", "reliability", accuracy=0.5, exact=0.0),
        row("a", "reliability", accuracy=0.25, exact=0.0, view="plain", main=False),
        row("a", "locality", agreement=1.0, group="near"),
        row("a", "locality", agreement=0.0, group="far"),
        row("b", "reliability", accuracy=1.0, exact=1.0),
        row("b", "fluency", fluency=610.0),
    ]
)


def means(rows: pd.DataFrame) -> dict[str, float]:
    return {r.metric: r.mean for r in summarise(rows, "m").itertuples()}


def test_scores_suffixes_and_groups_by_hand() -> None:
    assert means(ROWS) == {
        "reliability": 75.0, "reliability.exact": 50.0, "reliability.plain": 25.0, "reliability.plain.exact": 0.0,
        "locality": 50.0, "locality.near": 100.0, "locality.far": 0.0, "fluency": 610.0,
    }  # fmt: skip


def test_edit_success_by_hand() -> None:
    rows = pd.DataFrame(
        [
            row("a", "wanted", log_likelihood=-1.0, log_likelihood_before=-0.5),
            row("a", "opposite", log_likelihood=-3.0, log_likelihood_before=-3.0),
            row("b", "wanted", log_likelihood=-1.0, log_likelihood_before=-1.0),  # no opposite: left out
        ]
    )
    sentiment, topic = 1 / (1 + math.exp(-2.0)), math.exp(-0.5)
    found = {metric: values.to_dict() for _, metric, values in metric_values(rows)}
    assert found["success.sentiment"] == {("a", "a"): pytest.approx(sentiment)}
    assert found["success.topic"] == {("a", "a"): pytest.approx(topic)}
    assert found["success"] == {("a", "a"): pytest.approx(sentiment * topic)}


@pytest.fixture
def brevity():
    """A metric that a user declares in code of their own."""

    class Brevity(EditingMetric):
        name, title, meaning, place = "brevity", "Brevity", "how short it is", 15
        probes, column, scale = ("reliability",), "brevity", 1.0

    yield Brevity
    Brevity.name = ""  # plugins are named subclasses, for as long as the process lives


def test_one_declaration_reaches_tables_figures_and_comparisons(brevity: type[EditingMetric]) -> None:
    rows = ROWS.assign(brevity=[3.0, 9.0, None, None, 5.0, None])
    assert headline_metrics() == ("reliability", "brevity", "generalization", "locality", "portability", "fluency")
    assert means(rows)["brevity"] == 4.0
    summary = summarise(rows, "m")
    assert "| Brevity | **4.0 [" in markdown_table(summary)
    assert [axes.get_xlabel() for axes in metric_dots(summary).axes][:2] == ["Reliability", "Brevity"]
    panels = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in metric_bars(summary).axes]
    assert panels == [["Reliability", "Locality"], ["Brevity"], ["Fluency"]]  # a unit of its own has its own axis
    better = rows.assign(brevity=rows["brevity"] + 1)
    gaps = compare(better, rows, "new", "old")
    assert dict(zip(gaps["metric"], gaps["mean"], strict=True))["brevity"] == pytest.approx(1.0)


def test_titles() -> None:
    assert metric_title("reliability.plain.exact") == "Reliability (plain, exact)"
    assert metric_title("success.topic") == "Edit success (topic)"


def test_the_readme_defines_each_headline_metric_as_its_declaration_does() -> None:
    text = " ".join(README.read_text().split())
    for name in headline_metrics():
        metric = editing_metrics()[name]
        assert f"**{metric.title}**: {metric.meaning}" in text


@pytest.mark.parametrize("name", ["Reliability", "Generalization", "Locality", "Portability", "Fluency"])
def test_old_names_say_what_they_are_now(name: str) -> None:
    with pytest.warns(DeprecationWarning, match="PerRecordMean"):
        metric = getattr(instructedit.metrics, name)()
    metric.update([1], [1], [0], [0.5])
    assert metric.compute().item() == (0.5 if name == "Fluency" else 50.0)
