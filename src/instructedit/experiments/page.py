"""The results page of an experiment: one self-contained HTML file, which needs neither network nor other files."""

from __future__ import annotations

import base64
import datetime
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructedit.errors import UserError
from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel
from instructedit.pages import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run
    from pandas import DataFrame

    from instructedit.experiments.plan import Plan
    from instructedit.experiments.runner import RunResult
    from instructedit.tracking import MLflowTracker

_TEMPLATE = Path(__file__).with_name("page.html")
_LONG = 25  # tables with more rows are folded
_WORDS = 30  # cells with more characters get the CSS class "long"
_PREFIX = "provenance."
_P_VALUES = ("p_value", "p_holm", "corrected")  # columns of p-values


@dataclass(frozen=True)
class _Html:
    """One `Panel` as HTML."""

    anchor: str
    title: str
    note: str
    body: Any
    folded: bool


def page(
    experiment: Plan, results: Results, panels: Sequence[Panel], failures: Sequence[str], parent: MLflowTracker
) -> str:
    """Renders the results page; all text from data, models and grids is escaped.

    Args:
        experiment: The plan that was run.
        results: Its results.
        panels: The panels of its sections, in order.
        failures: Failures, one line each.
        parent: The experiment's own run, which has the date and the versions used.
    """
    client = parent.experiment
    runs = [(name, result, client.get_run(result.run_id)) for name, found in results.rows.items() for result in found]
    own = client.get_run(parent.run_id)
    anchors: set[str] = set()
    return render(
        _TEMPLATE,
        title=results.grid.title,
        question=results.grid.note,
        name=results.name,
        command=experiment.command,
        failures=failures,
        facts=_facts(experiment, own),
        versions=_versions(own),
        sections=[_section(each, anchors) for each in panels],
        configs=[(name, _config(found[0])) for name, found in results.rows.items()],
        runs=[_run(name, result.seed, run) for name, result, run in runs],
    )


def frame_html(frame: DataFrame) -> str:
    """Formats a table as HTML; ``mean``, ``low`` and ``high`` become one column, and p-values below 0.05 are bold."""
    columns = list(map(str, frame.columns))
    joined = {"mean", "low", "high"} <= set(columns)
    signed = joined and "baseline" in columns
    visible = [name for name in columns if not (joined and name in ("low", "high"))]
    texts = {}
    for name in visible:
        values = frame[name].tolist()
        if joined and name == "mean":
            ends = zip(values, frame["low"].tolist(), frame["high"].tolist(), strict=True)
            texts[name] = [_interval(*three, signed) for three in ends]
        elif name in _P_VALUES:
            texts[name] = [_p_value(value) for value in values]
        else:
            digits = _digits(values)
            texts[name] = [_cell(value, digits, name) for value in values]
    headers = {name: "difference" if signed and name == "mean" else _header(name) for name in visible}
    head = "".join(f"<th{_kind(frame[name].tolist())}>{escape(headers[name])}</th>" for name in visible)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in zip(*texts.values(), strict=True))
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def markdown_html(text: str) -> str:
    """Converts Markdown with tables to HTML; raw HTML, links and images, which could point outside, stay plain text."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    html = str(parser.render(text))
    return html.replace("&lt;ins&gt;", "<u>").replace("&lt;/ins&gt;", "</u>")  # second-best values of a table


def figure_html(figure: Figure, title: str) -> str:
    """Embeds a figure in the page as an SVG image; as an image, so that the ids of two figures do not clash."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "instructedit"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    data = base64.b64encode(file.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    # A wide figure scrolls on a narrow screen, since its text would be unreadable if it shrank.
    style = f"width: {width}px; min-width: min({width}px, 36rem)"
    image = f'<img alt="{escape(title)}" style="{style}" src="data:image/svg+xml;base64,{data}">'
    return f'<div class="figure">{image}</div>'


def _section(panel: Panel, taken: set[str]) -> _Html:
    from markupsafe import Markup

    bodies = []
    if panel.html is not None or panel.markdown is not None:
        bodies.append(panel.html if panel.html is not None else markdown_html(panel.markdown or ""))
    elif panel.frame is not None:
        bodies.append(frame_html(panel.frame))
    if bodies:
        bodies = [f'<div class="scroll">{bodies[0]}</div>']
    if panel.figure is not None:
        bodies.append(figure_html(panel.figure, panel.title))
    long = panel.markdown is None and panel.frame is not None and len(panel.frame) > _LONG
    anchor = re.sub(r"\W+", "-", panel.name)
    while anchor in taken:
        anchor += "-"
    taken.add(anchor)
    return _Html(anchor, panel.title, panel.note, Markup("\n".join(bodies)), panel.folded or long)


def _facts(experiment: Plan, own: Run) -> list[tuple[str, str]]:
    tags = own.data.tags
    device, system = (tags.get(f"{_PREFIX}{name}", "unknown") for name in ("device", "platform"))
    return [
        ("scale", experiment.scale.name),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        *(("beside", str(file)) for file in experiment.beside),
        ("date", _date(own.info.start_time)),
        ("machine", f"{device}, {os.cpu_count()} cores, {system}"),
        ("MLflow run", str(own.info.run_id)),
    ]


def _versions(own: Run) -> str:
    left_out = {"device", "platform", "constraints", "git.commit", "git.dirty"}
    names = {key.removeprefix(_PREFIX): value for key, value in own.data.tags.items() if key.startswith(_PREFIX)}
    versions = [f"{key} {value}" for key, value in names.items() if key not in left_out]
    changed = {"true": " with changes", "false": ""}.get(names.get("git.dirty", ""), "")
    return ", ".join([*versions, f"commit {names.get('git.commit', 'unknown')[:10]}{changed}"])


def _run(row: str, seed: int, run: Run) -> dict[str, Any]:
    info = run.info
    seconds = "–" if info.end_time is None else f"{(info.end_time - info.start_time) / 1000:.0f}"
    return {
        "row": row, "seed": seed, "run_id": info.run_id, "name": info.run_name, "status": info.status.lower(),
        "seconds": seconds, "date": _date(info.start_time),
        "commit": run.data.tags.get(f"{_PREFIX}git.commit", "unknown")[:10],
        "device": run.data.tags.get(f"{_PREFIX}device", "unknown"),
    }  # fmt: skip


def _config(result: RunResult) -> str:
    try:
        return result.artifact("config.yaml").read_text()
    except UserError as error:  # a run with a logger of its own
        return str(error)


def _date(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _header(name: str) -> str:
    return {"p_value": "p", "p_holm": "p (Holm)"}.get(name, name.replace("_", " "))


def _kind(values: Sequence[Any]) -> str:
    return ' class="number"' if any(_is_number(value) for value in values) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _missing(value: Any) -> bool:
    from pandas import isna

    return isna(value) is True  # of a list it is an array


def _digits(values: Sequence[Any]) -> int:
    """Returns the number of decimals with which a column's largest number has about three digits; 0 for integers."""
    sizes = [abs(value) for value in values if _is_number(value) and math.isfinite(value)]
    fractions = any(value % 1 for value in sizes)
    largest = max(sizes, default=0.0)
    return 0 if not fractions else 1 if largest >= 10 else 2 if largest >= 1 else 3


def _cell(value: Any, digits: int, name: str) -> str:
    if _missing(value):
        return "<td>–</td>"
    if _is_number(value):
        small = 0 < abs(value) < 10**-digits
        return f'<td class="number">{f"{value:.2g}" if small else f"{value:.{digits}f}"}</td>'
    text = str(value)
    if name == "run_id":
        return f'<td title="{escape(text)}"><code>{escape(text[:8])}</code></td>'
    kind = ' class="long"' if len(text) > _WORDS else ""
    return f"<td{kind}>{escape(text)}</td>"


def _interval(mean: float, low: float, high: float, signed: bool) -> str:
    if _missing(mean):
        return "<td>–</td>"
    sign = "+" if signed else ""
    rest = "" if _missing(low) else f" <small>[{low:{sign}.1f}, {high:{sign}.1f}]</small>"
    return f'<td class="number">{mean:{sign}.1f}{rest}</td>'


def _p_value(value: float) -> str:
    if _missing(value):
        return "<td>–</td>"
    text = "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
    return f'<td class="number">{f"<b>{text}</b>" if value < 0.05 else text}</td>'
