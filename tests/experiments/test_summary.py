"""Figures of several seeds, and corrected p-values, against what is worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from instructedit.analysis.summary import compare, holm, metric_values, summarise


def probes(accuracy, seed=None, task="zsre", clusters=None):
    """One reliability probe for each record."""
    names = [f"r{i}" for i in range(len(accuracy))]
    table = pd.DataFrame({"record": names, "cluster": clusters or names, "accuracy": accuracy, "task": task})
    table = table.assign(kind="reliability", group="", view="plain", main=True, agreement=math.nan)
    return table if seed is None else table.assign(seed=seed)


def reliability(table):
    """Its line of the summary."""
    summary = summarise(table, "MEND")
    return summary[summary["metric"] == "reliability"].iloc[0].to_dict()


@pytest.mark.parametrize(
    ("raw", "corrected"),
    [
        # 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1, which may not be below the one before
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.4], [0.8, 0.8]),
        ([0.9, 0.7], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm(raw, corrected):
    assert holm(raw) == pytest.approx(corrected)


def test_holm_does_not_count_what_has_no_value():
    found = holm([0.01, math.nan, 0.04])
    assert found[0::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(found[1])


def test_a_record_seen_with_three_seeds_is_one_cluster():
    rng = np.random.default_rng(0)
    per_seed = rng.random((3, 40))
    seeds = pd.concat([probes(values, seed) for seed, values in enumerate(per_seed)])
    several, means = reliability(seeds), reliability(probes(per_seed.mean(axis=0)))
    for key in ("mean", "low", "high", "n"):
        assert several[key] == pytest.approx(means[key]), key
    assert several["n"] == 40
    assert several["seeds"] == 3
    assert several["spread"] == pytest.approx(100 * np.std(per_seed.mean(axis=1), ddof=1))
    # records that are taken for three times as many would seem surer than they are
    thrice = seeds.assign(record=seeds["record"] + seeds["seed"].astype(str)).drop(columns="seed")
    thrice["cluster"] = thrice["record"]
    wrong = reliability(thrice)
    assert wrong["n"] == 120


def test_clusters_hold_records_that_hold_seeds():
    """By hand: record means 0.5, 1.0 and 0.0; cluster means 0.75 and 0.0."""
    table = pd.concat(
        [probes([0.0, 1.0, 0.0], 1, clusters=list("aab")), probes([1.0, 1.0, 0.0], 2, clusters=list("aab"))]
    )
    row = reliability(table)
    assert (row["mean"], row["n"], row["seeds"]) == (37.5, 2, 2)
    assert row["spread"] == pytest.approx(100 * np.std([0.25, 0.5], ddof=1))


def test_one_seed_has_no_spread():
    row = reliability(probes([0.0, 1.0], seed=7))
    assert row["seeds"] == 1
    assert math.isnan(row["spread"])
    assert "spread" not in summarise(probes([0.0, 1.0]), "MEND")


def test_what_is_not_linear_is_worked_out_for_each_seed():
    """SERAC's edit success of two seeds: the mean of both, not the success of mean likelihoods."""

    def replies(after, seed):
        kinds = {"wanted": after, "opposite": -3.0}
        rows = [
            {"kind": kind, "log_likelihood": value, "log_likelihood_before": -2.0, "record": "r", "cluster": "r"}
            for kind, value in kinds.items()
        ]
        table = pd.DataFrame(rows).assign(task="convsent", group="", view="plain", main=True, seed=seed)
        return table.assign(accuracy=math.nan, agreement=math.nan)

    def sentiment(table):
        return {metric: values.item() for _, metric, values in metric_values(table)}["success.sentiment"]

    one, two = replies(0.0, 1), replies(-9.0, 2)
    by_hand = [1 / (1 + math.exp(-(after + 3.0))) for after in (0.0, -9.0)]
    assert sentiment(one) == pytest.approx(by_hand[0])
    assert sentiment(pd.concat([one, two])) == pytest.approx(sum(by_hand) / 2)


def test_a_difference_over_seeds_is_of_records():
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((2, 30)), rng.random(30)
    seeds = pd.concat([probes(values, seed) for seed, values in enumerate(ours)])
    several = compare(seeds, probes(theirs, 0), "A", "B")
    means = compare(probes(ours.mean(axis=0)), probes(theirs), "A", "B")
    assert several["n"].item() == 30
    assert several["mean"].item() == pytest.approx(100 * (ours.mean() - theirs.mean()))
    for key in ("mean", "low", "high", "p_value"):
        assert several[key].item() == pytest.approx(means[key].item()), key
