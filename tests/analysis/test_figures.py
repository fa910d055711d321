"""Figures: what is drawn agrees with the numbers, nothing leaks, and files are written."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from instructedit.analysis import EditingAreas, area_map, area_maps, metric_bars, metric_dots, save_figure
from instructedit.errors import UserError

METRICS = ["reliability", "generalization", "locality", "portability"]
SHORT = ["block 5 · c_fc", "block 5 · c_proj"]
SITES = ["transformer.h.5.mlp.c_fc.weight", "transformer.h.5.mlp.c_proj.weight"]


def row(method: str, task: str, metric: str, mean: float, margin: float = 5, n: int = 40) -> dict[str, Any]:
    numbers = {"mean": mean, "low": mean - margin, "high": mean + margin, "n": n}
    return {"method": method, "task": task, "metric": metric, **numbers}


def summary() -> pd.DataFrame:
    """Two tasks, three methods; only the second task has fluency, and it has no generalization."""
    frames = []
    for i, method in enumerate(["unedited", "MEND", "InstructEdit"]):
        first = [row(method, "zsre", metric, 10.0 * j + 20 * i) for j, metric in enumerate(METRICS, start=1)]
        second = [row(method, "convsent", metric, 30.0 + 10 * i) for metric in ("reliability", "locality")]
        extra = [row(method, "convsent", "fluency", 600.0 + i), row(method, "zsre", "reliability.exact", 1.0)]
        frames.append(pd.DataFrame(first + second + extra))
    return pd.concat(frames)  # as one concatenates methods: with an index that repeats


def areas(count: int = 6, tasks: tuple[str, ...] = ("recent", "zsre", "counterfact")) -> EditingAreas:
    generator = torch.Generator().manual_seed(0)
    records = count * len(tasks)
    factors = {
        site: (torch.randn(records, 2, 4, generator=generator), torch.randn(records, 2, 4, generator=generator))
        for site in SITES
    }
    return EditingAreas.from_factors([str(i) for i in range(records)], list(tasks) * count, factors)


def legend(figure: Figure) -> list[str]:
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def ticks(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_one_panel_a_task_and_a_small_one_for_fluency() -> None:
    figure = metric_bars(summary(), {"convsent": "ConvSent", "zsre": "ZsRE (held out)"})
    assert [ticks(axes) for axes in figure.axes] == [
        ["Reliability", "Locality"],
        ["Fluency"],
        ["Reliability", "Generalization", "Locality", "Portability"],
    ]
    assert [axes.get_title("left") for axes in figure.axes] == ["ConvSent", "", "ZsRE (held out)"]
    assert [axes.get_title("right") for axes in figure.axes] == ["", "n = 40", "n = 40"]
    assert [axes.get_ylim() for axes in figure.axes if len(ticks(axes)) > 1] == [(0, 100), (0, 100)]
    assert legend(figure) == ["unedited", "MEND", "InstructEdit"]


def test_bars_and_whiskers_are_where_the_numbers_are() -> None:
    table = summary()
    axes = metric_bars(table).axes[0]
    width = axes.containers[1].patches[0].get_width()
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert [len(container.patches) for container in bars] == [4, 4, 4]
    for place, container in enumerate(bars):
        own = table[(table["method"] == container.get_label()) & (table["task"] == "zsre")].set_index("metric")
        segments = container.errorbar[2][0].get_segments()
        for at, (metric, bar, segment) in enumerate(zip(METRICS, container.patches, segments, strict=True)):
            middle = bar.get_x() + width / 2
            assert bar.get_height() == own.loc[metric, "mean"]
            assert middle == pytest.approx(at + (place - 1) * 0.86 / 3)
            assert segment == pytest.approx(np.array([[middle, own.loc[metric, end]] for end in ("low", "high")]))
    assert sorted(int(text.get_text()) for text in axes.texts) == sorted(
        table.query("task == 'zsre'")["mean"][lambda x: x > 1]
    )


def test_missing_means_and_intervals() -> None:
    rows = [
        row("A", "zsre", "reliability", 50),
        row("A", "zsre", "locality", math.nan),
        row("B", "zsre", "locality", 60),
    ]
    rows[2] |= {"low": math.nan, "high": math.nan, "n": 1}
    (axes,) = metric_bars(pd.DataFrame(rows)).axes
    heights = {bar.get_x() // 0.5: bar.get_height() for bar in axes.patches}
    assert sorted(heights.values()) == [50, 60]
    assert sorted(text.get_text() for text in axes.texts) == ["50", "60"]
    assert axes.get_title("right") == "n = 1 to 40"
    with pytest.raises(ValueError, match="nothing to draw"):
        metric_bars(pd.DataFrame(rows[1:2]))


def test_only_fluency() -> None:
    (axes,) = metric_bars(pd.DataFrame([row("A", "convsent", "Fluency", 600)])).axes
    assert (axes.get_title("left"), axes.get_title("right"), ticks(axes)) == ("convsent", "n = 40", ["Fluency"])


def test_methods_stay_apart_when_the_colours_come_round() -> None:
    names = ["unedited", *(f"method {i}" for i in range(20))]
    (axes,) = metric_bars(pd.DataFrame([row(name, "zsre", "reliability", 50) for name in names])).axes
    looks = [(bar.get_facecolor(), bar.get_hatch()) for bar in axes.patches]
    assert len(set(looks)) == 21
    assert looks[0][0][:3] == pytest.approx((0.78, 0.78, 0.78))


def test_values_are_left_out_where_they_do_not_fit() -> None:
    rows = [row(f"method {i}", "zsre", metric, 50) for i in range(40) for metric in METRICS]
    (axes,) = metric_bars(pd.DataFrame(rows)).axes
    assert {text.get_text() for text in axes.texts} == {""}


def test_dots_and_whiskers_are_where_the_numbers_are() -> None:
    table = summary()
    figure = metric_dots(table, {"convsent": "ConvSent"})
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_xlabel() for axes in drawn] == [
        *("Reliability", "Locality", "Fluency"),
        *("Reliability", "Generalization", "Locality", "Portability"),
    ]
    assert [axes.get_title("left") for axes in drawn if axes.get_title("left")] == ["ConvSent", "zsre"]
    assert not figure.legends  # there is one kind of dot
    methods = ["unedited", "MEND", "InstructEdit"]
    assert [label.get_text() for label in drawn[3].get_yticklabels()] == methods
    axes = drawn[4]
    assert axes.yaxis_inverted()
    own = table.query("task == 'zsre' and metric == 'generalization'").set_index("method")
    points = [tuple(point) for container in axes.containers for point in container.lines[0].get_xydata()]
    assert points == [(own.loc[name, "mean"], place) for place, name in enumerate(methods)]
    ends = [segment.tolist() for container in axes.containers for segment in container.lines[2][0].get_segments()]
    assert ends == [[[low, place], [high, place]] for place, (low, high) in enumerate(own[["low", "high"]].to_numpy())]
    assert drawn[2].get_xlim()[0] > 500  # fluency has its own scale
    assert {axes.get_xlim() for axes in drawn if axes is not drawn[2]} == {(-3, 103)}


def test_published_dots_are_on_the_lines_of_their_methods() -> None:
    paper = [
        ("MEND", "zsre", "Locality", 71.0),
        ("GRACE", "zsre", "Locality", 5.0),
        ("MEND", "recent", "Locality", 9.0),
    ]
    figure = metric_dots(summary(), baselines=pd.DataFrame(paper, columns=["method", "task", "metric", "mean"]))
    hollow = {
        axes.get_xlabel(): [tuple(point) for point in collection.get_offsets().tolist()]
        for axes in figure.axes
        for collection in axes.collections
        if isinstance(collection, PathCollection)
    }
    assert hollow == {"Locality": [(71.0, 1)]}
    assert legend(figure) == ["measured", "paper"]


def test_nothing_to_draw_as_dots() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        metric_dots(pd.DataFrame([row("A", "zsre", "reliability.exact", 1)]))


def test_map_has_one_marker_and_colour_a_task() -> None:
    points = np.arange(10.0).reshape(5, 2)
    tasks = ["zsre", "recent", "zsre", "recent", "recent"]
    figure = area_map(points, tasks, "MEND", "t-SNE", {"zsre": "ZsRE"})
    (axes,) = figure.axes
    assert legend(figure) == ["ZsRE", "recent"]
    assert [collection.get_offsets().tolist() for collection in axes.collections] == [
        points[[0, 2]].tolist(),
        points[[1, 3, 4]].tolist(),
    ]
    assert len({tuple(collection.get_facecolor()[0]) for collection in axes.collections}) == 2
    assert len({len(collection.get_paths()[0].vertices) for collection in axes.collections}) == 2
    assert (axes.get_title(), figure.get_supxlabel()) == ("MEND", "t-SNE")


def test_maps_are_a_grid_of_editors_and_sites() -> None:
    figure = area_maps({"MEND": areas(), "InstructEdit": areas(5)}, perplexity=30, seed=3)
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes] == [*SHORT, "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["MEND", "", "InstructEdit", ""]
    assert legend(figure) == ["counterfact", "recent", "zsre"]
    assert sum(len(collection.get_offsets()) for collection in figure.axes[0].collections) == 18
    assert figure.get_supxlabel().startswith("t-SNE, perplexity 4.67 to 5.67, seed 3.")


def test_a_caption_is_no_wider_than_its_figure() -> None:
    figure = area_map(np.arange(10.0).reshape(5, 2), ["zsre"] * 5, "MEND", " ".join(["Which words do not fit?"] * 6))
    for shown in (figure, area_maps({"MEND": areas()}, [SITES[0]], perplexity=30, seed=3)):
        shown.draw_without_rendering()
        (written,) = [text for text in shown.texts if text.get_text() == shown.get_supxlabel()]
        extent = written.get_window_extent()
        assert "\n" in written.get_text()
        assert 0 <= extent.x0 < extent.x1 <= shown.bbox.width


def test_editors_of_other_matrices_have_their_own_titles() -> None:
    one = areas()
    one.factors, one.norms = ({SITES[1]: own[SITES[1]]} for own in (one.factors, one.norms))
    figure = area_maps({"MEND": areas(), "InstructEdit": areas(5), "ROME": one}, method="pca")
    assert [axes.get_title() for axes in figure.axes] == [*SHORT, "", "", SHORT[1], ""]
    assert [bool(axes.collections) for axes in figure.axes] == [True] * 5 + [False]


def test_a_task_looks_the_same_whichever_editor_has_it() -> None:
    figure = area_maps({"one": areas(4, ("zsre",)), "two": areas(4)}, [SITES[1]], "pca")
    upper, lower = ([tuple(c.get_facecolor()[0]) for c in axes.collections] for axes in figure.axes)
    assert upper == lower[2:]
    assert "principal components" in figure.get_supxlabel()


def test_maps_of_an_unknown_site() -> None:
    with pytest.raises(UserError, match="no edited matrix named x"):
        area_maps({"MEND": areas()}, ["x"], "pca")


def test_files_are_written_and_do_not_change(tmp_path: Path) -> None:
    for name in ("new/v1.0", "new/again"):
        save_figure(metric_bars(summary()), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["again.png", "again.svg", "v1.0.png", "v1.0.svg"]
    for suffix, mark in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        first, second = ((tmp_path / f"new/{name}{suffix}").read_bytes() for name in ("v1.0", "again"))
        assert first.startswith(mark)
        assert first == second


def test_no_figure_and_no_setting_outlives_the_call() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = metric_bars(summary())
    assert dict(matplotlib.rcParams) == before
    assert figure.canvas.manager is None
    assert sys.modules["matplotlib.pyplot"].get_fignums() == []
