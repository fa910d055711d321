"""The results page: one file that asks for nothing, with everything in it and all text escaped."""

from __future__ import annotations

import base64
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
from matplotlib.figure import Figure
from tests.experiments.helpers import GRID, parents, run, write

from instructedit import paths
from instructedit.experiments import Experiment
from instructedit.experiments.page import figure_html, frame_html, markdown_html, page
from instructedit.experiments.sections import Panel, Results
from instructedit.tracking import MLflowTracker, artifact_path

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags, what they point to, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.targets, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [
            value for name, value in attrs if name in ("src", "href", "action", "data", "poster", "srcset")
        ]

    def handle_data(self, data):
        self.text += data


def only_itself(text):
    """Whether nothing is loaded from anywhere."""
    read = Page(text)
    ids = {part.split('"')[0] for part in text.split('id="')[1:]}
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(read.tags)
    assert "@import" not in text
    assert "url(" not in text
    for target in read.targets:
        assert target.startswith("data:image/svg+xml;base64,") or target.removeprefix("#") in ids, target[:60]
    assert "http://" not in text
    assert "https://" not in text
    return read


@pytest.fixture(scope="module")
def hostile(made, tmp_path_factory):
    """An experiment whose title, note and names are hostile, not run yet."""
    root = tmp_path_factory.mktemp("page")
    for folder in ("configs", "experiments"):
        shutil.copytree(made / folder, root / folder)
    rows = {"unedited": GRID["rows"]["unedited"], "MEND <i>": GRID["rows"]["MEND"]}
    spec = GRID | {
        "title": f"A try {EVIL}",
        "note": f"Why {EVIL}?",
        "seeds": [3],
        "rows": rows,
        "compare": [["MEND <i>", "unedited"]],
    }
    write(root / "experiments/try/grid.yaml", spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "SHARED", root)
        yield Experiment.load("try", "one", root=str(root / "store"), out=str(root / "out"))


@pytest.fixture(scope="module")
def made_page(hostile):
    status, _printed, errors = run(hostile.root, hostile.out)
    assert status == 0, errors
    return hostile, (hostile.out / "index.html").read_text()


def test_the_page_of_a_run(made_page):
    experiment, text = made_page
    read = only_itself(text)
    assert "<i>" not in text.replace("<img", "")
    for said in (
        f"A try {EVIL}", f"Why {EVIL}?", "instructedit experiment try --scale one --seeds '[3]'", "MEND <i>",
        "one", "torch ", "commit ", "Reliability", "p (Holm)", "paper: published figures for Big",
        "config of MEND <i>", "class_path: instructedit.editors.mend.Mend", "finished",
    ):  # fmt: skip
        assert said in read.text, said
    assert read.tags.count("img") == 2  # metrics, areas
    store = experiment.root
    run_ids = list(pd.read_csv(experiment.out / "summary.csv")["method"].unique())
    assert run_ids == ["unedited", "MEND <i>"]
    parent = parents(store)[0]
    assert artifact_path(parent.info.run_id, "index.html", store).read_text() == text
    assert parent.info.run_id in text


def test_all_that_is_shown_is_escaped(hostile, tmp_path):
    results = Results("try", hostile.grid, "one", {}, None, {})
    figure = Figure()
    figure.subplots().set_title(EVIL)
    shown = [
        Panel("a", f"Table {EVIL}", f"note {EVIL}", frame=pd.DataFrame({f"c{EVIL}": [EVIL], "run_id": [f'"{EVIL}']})),
        Panel(
            "a",
            "Words",
            markdown=f"| a |\n|---|\n| {EVIL} |\n\n![x](https://example.org/x.png) [y](http://y)\n\n{EVIL}",
        ),
        Panel("c", f'" onload="{EVIL}', figure=figure, frame=pd.DataFrame({"x": [1]})),
    ]
    with MLflowTracker(root=tmp_path) as tracker:
        text = page(hostile, results, shown, [f"trouble {EVIL}"], tracker)
    read = only_itself(text.replace("https://example.org/x.png", "").replace("http://y", ""))
    for said in (f"Table {EVIL}", f"note {EVIL}", f"c{EVIL}", f"trouble {EVIL}"):
        assert said in read.text, said
    assert "onload=" in read.text
    assert 'id="a"' in text
    assert 'id="a-"' in text  # two sections may choose one name


def test_a_table_on_the_page():
    frame = pd.DataFrame(
        {
            "method": ["A", "A"], "baseline": ["B", "B"], "mean": [1.26, -0.5], "low": [0.31, float("nan")],
            "high": [2.0, float("nan")], "p_value": [0.0004, 0.3], "p_holm": [float("nan"), 1.0], "n": [12, 7],
            "rate": [5e-5, 2e-4], "corrected": [0.04, 0.2], "paper": pd.array([None, 4321], dtype="Int64"),
        }
    )  # fmt: skip
    html = frame_html(frame)
    assert "+1.3 <small>[+0.3, +2.0]</small>" in html
    assert '<td class="number">-0.5</td>' in html
    assert "<b>&lt; 0.001</b>" in html
    assert '<td class="number">0.300</td>' in html
    assert '<td class="number">12</td>' in html
    assert '<td class="number">5e-05</td>' in html  # small numbers are not rounded away
    head = '<th>method</th><th>baseline</th><th class="number">difference</th>'
    assert head + '<th class="number">p</th><th class="number">p (Holm)</th>' in html
    assert '<td class="number"><b>0.040</b></td>' in html
    assert "<td>–</td></tr>" in html  # a missing whole number is one like any other
    assert "high" not in html


def test_markdown_on_the_page():
    html = markdown_html("| a |\n|---:|\n| <ins>2.0</ins> |\n\n```\nx < y\n```\n\n<b>bold</b>")
    assert "<u>2.0</u>" in html
    assert "x &lt; y" in html
    assert "<b>" not in html


def test_a_figure_on_the_page_is_whole():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    html = figure_html(figure, "A & B")
    assert 'alt="A &amp; B"' in html
    svg = base64.b64decode(html.split("base64,")[1].split('"')[0]).decode()
    assert svg.rstrip().endswith("</svg>")
    assert html == figure_html(figure, "A & B")
