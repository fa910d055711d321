"""The mixture of task streams: proportions, completeness, repeatability, resuming, several processes."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instructedit.data import mixture as module
from instructedit.data.mixture import MixtureSampler, mixture

weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=6)
streams = st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5))


def batches(count, sizes=(5, 3, 7), shares=(1, 2, 1), seed=0, batch_size=3, **options):
    return list(islice(MixtureSampler(sizes, shares, seed, batch_size, **options), count))


@given(weights, st.integers(1, 200))
@settings(deadline=None, max_examples=100)
@example([0.1, 10, 10, 0.1, 0.37, 2.93], 104)
def test_every_prefix_is_within_one_record_of_the_weights(shares, length):
    counts = Counter()
    for drawn, (task, _) in enumerate(islice(mixture([4] * len(shares), shares, 0), length), start=1):
        counts[task] += 1
        for other, share in enumerate(shares):
            assert abs(counts[other] - drawn * share / sum(shares)) < 1 + 1e-6


@given(streams)
@settings(deadline=None, max_examples=60)
def test_every_record_of_a_task_comes_once_before_any_comes_twice(case):
    sizes, seed = case
    seen: dict[int, list[int]] = {task: [] for task in range(len(sizes))}
    for task, index in islice(mixture(sizes, [1.0] * len(sizes), seed), 4 * sum(sizes)):
        seen[task].append(index)
    for task, size in enumerate(sizes):
        rounds = [seen[task][i : i + size] for i in range(0, len(seen[task]), size)]
        assert all(sorted(each) == list(range(size)) for each in rounds if len(each) == size)
        assert all(len(set(each)) == len(each) for each in rounds)


def test_the_order_is_new_in_every_round_and_another_for_every_seed():
    def orders(seed):
        drawn = [index for _, index in islice(mixture([30], [1.0], seed), 90)]
        return [tuple(drawn[i : i + 30]) for i in (0, 30, 60)]

    assert len({*orders(0), *orders(1)}) == 6


def test_a_task_keeps_its_order_when_the_weights_change():
    """So that a single-task run and a mixture see a task's records in the same order."""
    alone = [i for _, i in islice(mixture([8], [1.0], 0), 8)]
    mixed = [i for task, i in islice(mixture([8, 8], [1.0, 3.0], 0), 64) if task == 0][:8]
    assert alone == mixed


@given(streams, st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_the_same_seed_gives_the_same_stream(case, batch_size):
    sizes, seed = case
    options = {"sizes": sizes, "shares": [1.0] * len(sizes), "seed": seed, "batch_size": batch_size}
    assert batches(12, **options) == batches(12, **options)


def test_draws_are_numbered_from_the_start_of_the_stream():
    assert [draw for batch in batches(4) for draw, _, _ in batch] == list(range(12))
    assert [draw for batch in batches(2, first=3) for draw, _, _ in batch] == list(range(9, 15))


@given(st.integers(0, 20), st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3)]))
@settings(deadline=None, max_examples=30)
def test_a_resumed_stream_is_the_tail_of_the_whole_stream(first, place):
    rank, world = place
    whole = batches(25, rank=rank, world=world)
    assert batches(25 - first, first=first, rank=rank, world=world) == whole[first:]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_out_among_themselves(world):
    shares = [batches(6, rank=rank, world=world) for rank in range(world)]
    together = [shares[rank][step] for step in range(6) for rank in range(world)]
    assert together == batches(6 * world)


def test_iterating_again_starts_again():
    sampler = MixtureSampler([5, 3], [1, 1], 0, 2)
    assert list(islice(sampler, 5)) == list(islice(sampler, 5))


def test_the_checks_here_notice_a_broken_mixture(monkeypatch):
    """A stream that draws with repetition must not pass for one that goes through all records."""

    class Careless(module.random.Random):
        def sample(self, population, k):
            return [self.choice(population) for _ in range(k)]

    monkeypatch.setattr(module.random, "Random", Careless)
    drawn = [index for _, index in islice(mixture([20], [1.0], 0), 20)]
    assert sorted(drawn) != list(range(20))
