"""The view of separated tasks: its numbers against scikit-learn on dense updates, its figures, what it leaves out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp
from sklearn.metrics import silhouette_score

from instructedit.analysis import EditingAreas
from instructedit.analysis.seeds import across_seeds, interval_text
from instructedit.analysis.separations import map_pairs, separation_dots, separation_table
from instructedit.errors import UserError
from instructedit.experiments.experiment import shared_titles
from instructedit.experiments.runner import RunResult
from instructedit.experiments.sections import Results
from instructedit.experiments.sections.separation import SeparationSection
from instructedit.experiments.spec import Grid, Row

SITES = ["h.4.mlp.c_fc.weight", "h.5.mlp.c_proj.weight"]
TITLES = {"counterfact": "CounterFact", "zsre": "ZsRE (held out)"}


def areas(distance: float, seed: int, sites: list[str] = SITES, titles: dict[str, str] = TITLES) -> EditingAreas:
    """Twelve updates of each task about a centre of its own, the centres as far apart as asked for."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(4)[:2] * distance
    tasks = [task for task in titles.values() for _ in range(12)]
    factors = {}
    for site in sites:
        a = torch.randn(24, 2, 4, generator=generator) + centres.repeat_interleave(12, 0)[:, None]
        factors[site] = a, torch.randn(24, 2, 5, generator=generator) + distance
    return EditingAreas.from_factors([str(i) for i in range(24)], tasks, factors)


def child(own: EditingAreas | None, seed: int = 0, titles: dict[str, str] = TITLES) -> RunResult:
    return RunResult(f"run-{seed}", seed, pd.DataFrame(), own, titles, Path("nowhere"))


def results(rows: dict[str, list[RunResult]], **options: float) -> Results:
    grid = Grid("A try", (0,), {name: Row("mend") for name in rows}, options={"separation": options})
    return Results("try", grid, "one", rows, None, TITLES)


def dense(own: EditingAreas, site: str) -> np.ndarray:
    a, b = own.factors[site]
    return torch.einsum("nro,nri->noi", b, a).flatten(1).numpy()


def test_the_measures_are_those_of_dense_updates() -> None:
    seeds = [areas(1.0, seed) for seed in (0, 1, 2)]
    table = separation_table({"MEND": seeds}).set_index(["site", "measure"])
    assert list(table.index.unique("site")) == SITES
    for site in SITES:
        silhouettes, ratios = [], []
        for own in seeds:
            x = dense(own, site)
            silhouettes.append(silhouette_score(x, own.tasks, metric="cosine"))
            means = [x[:12].mean(0), x[12:].mean(0)]
            within = ((x[:12] - means[0]) ** 2).sum() + ((x[12:] - means[1]) ** 2).sum()
            between = 12 * sum(((mean - x.mean(0)) ** 2).sum() for mean in means)
            ratios.append(between / within)
        for measure, values in (("silhouette", silhouettes), ("variance_ratio", ratios)):
            row = table.loc[(site, measure)]
            interval = ttest_1samp(values, 0).confidence_interval(0.95)
            assert row["mean"] == pytest.approx(np.mean(values), abs=1e-5)
            low = max(interval.low, 0 if measure == "variance_ratio" else -1)
            assert (row["low"], row["high"]) == pytest.approx((low, interval.high), abs=1e-5)
        assert table.loc[(site, "probe_accuracy"), "chance"] == 0.5
        assert math.isnan(table.loc[(site, "silhouette"), "chance"])
    assert set(table["seeds"]) == {3}


def test_tasks_far_apart_score_higher_than_tasks_at_one_place() -> None:
    table = separation_table({"far": [areas(3, 0), areas(3, 1)], "near": [areas(0, 0), areas(0, 1)]})
    means = table.groupby(["measure", "method"])["mean"].mean().unstack()
    assert (means["far"] > means["near"]).all()
    assert means.loc["probe_accuracy", "far"] > 0.95
    assert means.loc["probe_accuracy", "near"] < 0.8


def test_one_seed_has_no_interval() -> None:
    found = across_seeds([0.25, math.nan])
    assert (found.mean, found.n) == (0.25, 1)
    assert math.isnan(found.low)
    cut = across_seeds([0.1, 0.9], bounds=(0, 1))
    assert (cut.mean, cut.low, cut.high) == (0.5, 0, 1)
    assert interval_text(0.25, found.low, found.high, 2) == "0.25"
    assert interval_text(0.25, 0.125, 0.375, 2) == "0.25 [0.12, 0.38]"
    assert interval_text(math.nan, math.nan, math.nan) == "–"


def test_dots_are_where_the_numbers_are() -> None:
    table = separation_table({"MEND": [areas(1, 0), areas(1, 1)], "InstructEdit": [areas(2, 0)]})
    figure = separation_dots(table)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MEND", "InstructEdit"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["block 4 · c_fc", "block 5 · c_proj"]
    drawn = [container.lines[0].get_xdata().tolist() for container in axes.containers]
    own = table[table["measure"] == "silhouette"]
    assert drawn == [own.loc[own["method"] == name, "mean"].tolist() for name in ("MEND", "InstructEdit")]
    dashed = [line for line in figure.axes[2].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [0.5]
    assert not [line for line in axes.lines if line.get_linestyle() == "--"]


def test_a_map_has_principal_components_below_t_sne() -> None:
    only = areas(1, 0, SITES[1:])
    figure = map_pairs({"MEND": areas(1, 0), "InstructEdit": areas(2, 1), "ROME": only}, SITES[0], 30, 3, TITLES)
    assert [axes.get_title() for axes in figure.axes] == ["MEND", "InstructEdit", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["t-SNE", "", "PCA", ""]
    x = dense(areas(2, 1), SITES[0])
    spread = np.linalg.svd(x - x.mean(0), compute_uv=False)[:2] ** 2
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in figure.axes[3].collections])
    assert (drawn**2).sum(0) == pytest.approx(spread, rel=1e-4)
    assert "perplexity 7.67, seed 3" in figure.get_supxlabel()
    with pytest.raises(UserError, match="no edited matrix named x"):
        map_pairs({"MEND": only}, "x")


def test_a_task_is_one_task_whatever_a_run_held_out() -> None:
    """Runs that trained on other tasks have other titles; the maps show one colour and one name for both."""
    other = {"counterfact": "CounterFact (held out)", "zsre": "ZsRE"}
    rows = {"a": [child(areas(2, 0))], "b": [child(areas(2, 0, titles=other), titles=other)]}
    shown = list(SeparationSection().show(results(rows)))
    assert [one.name for one in shown] == ["separation", "separation-table", "map-0", "map-1"]
    figure = shown[2].figure
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CounterFact", "ZsRE (held out)"]
    left, right = (figure.axes[i].collections[0].get_offsets() for i in (2, 3))
    assert np.asarray(left) == pytest.approx(np.asarray(right))
    frame = shown[1].frame
    assert frame is not None
    assert frame["method"].tolist() == ["a", "a", "b", "b"]
    assert frame["Silhouette (cosine)"].str.fullmatch(r"-?\d\.\d\d").all()


def test_the_grid_says_perplexity_and_seed() -> None:
    shown = list(SeparationSection().show(results({"a": [child(areas(2, 0))]}, perplexity=4, seed=9)))
    assert shown[2].figure is not None
    assert "perplexity 4, seed 9" in shown[2].figure.get_supxlabel()


def test_rows_without_areas_show_nothing() -> None:
    assert list(SeparationSection().show(results({"unedited": [child(None)]}))) == []
    shown = list(SeparationSection().show(results({"unedited": [child(None)], "a": [child(areas(1, 0))]})))
    assert shown[1].frame is not None
    assert set(shown[1].frame["method"]) == {"a"}


def test_a_task_that_only_some_rows_held_out_goes_by_its_name() -> None:
    one = {"counterfact": "CounterFact", "zsre": "ZsRE (held out)"}
    other = {"counterfact": "CounterFact (held out)", "zsre": "ZsRE (held out)"}
    assert shared_titles([one, other]) == {"counterfact": "CounterFact", "zsre": "ZsRE (held out)"}
    assert shared_titles([other]) == other
