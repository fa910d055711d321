"""The view of the edits' sizes: norms of dense updates, the ratio of the tasks' medians, boxes at the quartiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp

from instructedit.analysis import EditingAreas
from instructedit.analysis.magnitudes import magnitude_boxes, magnitude_spread, magnitudes
from instructedit.experiments.runner import RunResult
from instructedit.experiments.sections import Results
from instructedit.experiments.sections.magnitudes import MagnitudesSection
from instructedit.experiments.spec import Grid, Row

SITE = "h.5.mlp.c_proj.weight"
TITLES = {"recent": "Recent", "convsent": "ConvSent"}


def updates(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(10, 2, n, generator=generator) for n in (4, 3))
    b[5:] *= 8  # the second task's edits are larger
    return a, b


def areas(seed: int) -> EditingAreas:
    tasks = ["Recent"] * 5 + ["ConvSent"] * 5
    return EditingAreas.from_factors([f"r{i}" for i in range(10)], tasks, {SITE: updates(seed)})


def norms(seed: int) -> np.ndarray:
    a, b = (x.numpy() for x in updates(seed))
    return np.array([np.linalg.norm(b[i].T @ a[i]) for i in range(10)])


def test_the_norms_are_those_of_dense_updates() -> None:
    frame = magnitudes({"MEND": {3: areas(0), 4: areas(1)}})
    assert frame["norm"].to_numpy() == pytest.approx(np.concatenate([norms(0), norms(1)]), rel=1e-5)
    assert frame["seed"].tolist() == [3] * 10 + [4] * 10
    assert frame["record"].tolist()[:2] == ["r0", "r1"]


def test_the_ratio_is_of_the_tasks_medians_over_seeds() -> None:
    (row,) = magnitude_spread(magnitudes({"MEND": {s: areas(s) for s in (0, 1, 2)}})).itertuples()
    medians = [[np.median(norms(s)[part]) for part in (slice(0, 5), slice(5, 10))] for s in (0, 1, 2)]
    ratios = [max(own) / min(own) for own in medians]
    interval = ttest_1samp(ratios, 0).confidence_interval(0.95)
    assert (row.ratio, row.low, row.high) == pytest.approx(
        (np.mean(ratios), max(interval.low, 1), interval.high), rel=1e-4
    )
    assert row.ratio > 3
    assert row.median == pytest.approx(np.median(np.concatenate([norms(s) for s in (0, 1, 2)])), rel=1e-4)


def test_boxes_stand_at_the_quartiles_of_each_task() -> None:
    figure = magnitude_boxes(magnitudes({"MEND": {0: areas(0)}, "InstructEdit": {0: areas(1)}}), TITLES)
    first = figure.axes[0]
    assert first.get_yscale() == "log"
    assert (first.get_title(), first.get_ylabel()) == ("block 5\nc_proj", "MEND")
    for patch, part in zip(first.patches, (slice(5, 10), slice(0, 5)), strict=True):
        heights = patch.get_path().vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx(
            tuple(np.quantile(norms(0)[part], [0.25, 0.75])), rel=1e-4
        )
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_the_view() -> None:
    def child(own: EditingAreas | None, seed: int) -> RunResult:
        return RunResult(f"run-{seed}", seed, pd.DataFrame(), own, TITLES, Path("nowhere"))

    rows = {"unedited": [child(None, 0)], "MEND": [child(areas(0), 0), child(areas(1), 1)]}
    grid = Grid("A try", (0, 1), {name: Row("mend") for name in rows})
    figure, table = MagnitudesSection().show(Results("try", grid, "one", rows, None, TITLES))
    assert figure.figure is not None
    assert [text.get_text() for text in figure.figure.legends[0].get_texts()] == ["Recent", "ConvSent"]
    assert table.frame is not None
    (line,) = table.frame.to_dict("records")
    assert (line["method"], line["layer"], line["seeds"]) == ("MEND", "block 5 · c_proj", 2)
    assert line["ratio"].endswith("]")
    none = {"unedited": rows["unedited"]}
    assert list(MagnitudesSection().show(Results("try", grid, "one", none, None, TITLES))) == []
