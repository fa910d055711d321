"""Bootstrap intervals: hand-worked means, coverage on seeded draws, and degenerate inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from instructedit.metrics import Interval, bootstrap_interval, intervals, paired_difference


def test_mean_of_cluster_means_by_hand() -> None:
    # Clusters: a -> (1 + 3) / 2 = 2, b -> 8; nan left out; mean 5. Two clusters: a sample is 2, 5 or 8.
    interval = bootstrap_interval([1.0, 8.0, 3.0, math.nan], ["a", "b", "a", "b"])
    assert interval == Interval(mean=5.0, low=2.0, high=8.0, n=2)


def test_each_record_is_its_own_cluster_by_default() -> None:
    values = np.random.default_rng(0).random(30)
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values, clusters=np.arange(30))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low < interval.mean < interval.high


def test_interval_agrees_with_a_plain_loop() -> None:
    values = np.random.default_rng(1).random(50)
    draws = np.random.default_rng(2)
    means = [np.mean([values[draws.integers(50)] for _ in range(50)]) for _ in range(1000)]
    interval = bootstrap_interval(values, level=0.9, resamples=4000)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=0.01)


def test_blocks_do_not_change_the_size_or_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(50)
    whole = bootstrap_interval(values)
    monkeypatch.setattr(intervals, "_BLOCK", 120)  # two samples a block
    blocks = bootstrap_interval(values)
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=0.01)


def test_coverage_is_near_its_level() -> None:
    # 200 seeded studies of 40 clusters with 3 correlated records each; the true mean is 0. Ignoring the clusters
    # would cover far less often.
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 3)
    covered = naive = 0
    for _ in range(200):
        values = rng.normal(size=40)[clusters] + 0.1 * rng.normal(size=120)
        interval, blind = bootstrap_interval(values, clusters, resamples=500), bootstrap_interval(values, resamples=500)
        covered += interval.low <= 0 <= interval.high
        naive += blind.low <= 0 <= blind.high
    assert 0.90 <= covered / 200 <= 0.99
    assert naive / 200 < 0.85


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_no_values(values: list[float]) -> None:
    interval = bootstrap_interval(values)
    assert interval.n == 0
    assert all(map(math.isnan, (interval.mean, interval.low, interval.high)))


def test_one_cluster_has_a_mean_but_no_interval() -> None:
    interval = bootstrap_interval([1.0, 2.0], ["a", "a"])
    assert (interval.mean, interval.n) == (1.5, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_equal_values_give_an_interval_without_width() -> None:
    assert bootstrap_interval([0.5] * 8) == Interval(0.5, 0.5, 0.5, 8)


def test_seed_fixes_the_interval() -> None:
    values = np.random.default_rng(0).random(20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize(
    "wrong", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}, {"clusters": ["a"]}, {"clusters": "a"}]
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval([1.0, 2.0], **wrong)


def test_paired_difference_by_hand() -> None:
    a = {"r1": 3.0, "r2": 2.0, "r3": math.nan, "r4": 1.0, "r5": 6.0}
    b = {"r5": 2.0, "r2": 1.0, "r1": 1.0, "r3": 0.0, "r6": 0.0}
    difference = paired_difference(a, b, clusters={"r1": "x", "r2": "y", "r5": "x"})
    # r3 is nan in a, r4 only in a, r6 only in b. Clusters: x -> (2 + 4) / 2 = 3, y -> 1.
    assert (difference.mean, difference.low, difference.high, difference.n) == (2.0, 1.0, 3.0, 2)
    assert difference.dropped == 3
    assert difference.p_value == pytest.approx(2 / 2001)  # no sample of two positive clusters is below 0


def test_paired_difference_does_not_depend_on_the_order_of_records() -> None:
    rng = np.random.default_rng(0)
    a, b = ({f"r{i}": float(v) for i, v in enumerate(rng.random(20))} for _ in range(2))
    assert paired_difference(a, b) == paired_difference(dict(reversed(a.items())), b)
    assert paired_difference(a, b).mean == pytest.approx(-paired_difference(b, a).mean)


def test_pairing_finds_a_small_difference_that_hides_between_records() -> None:
    rng = np.random.default_rng(0)
    b = {f"r{i}": float(v) for i, v in enumerate(rng.random(100))}
    a = {record: value + 0.02 + 0.01 * float(rng.normal()) for record, value in b.items()}
    difference = paired_difference(a, b)
    assert difference.low > 0
    assert difference.p_value < 0.01
    assert bootstrap_interval(list(a.values())).low < bootstrap_interval(list(b.values())).high


def test_p_value_is_rarely_small_where_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    zero = {f"r{i}": 0.0 for i in range(40)}
    p_values = [
        paired_difference({record: float(rng.normal()) for record in zero}, zero, resamples=300).p_value
        for _ in range(200)
    ]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10
    assert 0.35 < np.median(p_values) < 0.65


def test_no_difference_and_too_few_records() -> None:
    same = {"a": 1.0, "b": 2.0}
    assert paired_difference(same, same).p_value == 1.0
    for scores in ({}, {"a": 1.0}):
        difference = paired_difference(scores, same)
        assert difference.dropped == 2 - len(scores)
        assert math.isnan(difference.p_value)
        assert math.isnan(difference.low)


def test_a_record_without_a_cluster_is_refused() -> None:
    with pytest.raises(KeyError, match="b"):
        paired_difference({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}, clusters={"a": "x"})
