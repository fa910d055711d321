"""Balanced, reproducible mixing of task streams, which can be resumed at any point."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

from torch.utils.data import Sampler


def mixture(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Iterator[tuple[int, int]]:
    """Generates an endless stream of (task, index of a record).

    Tasks occur in proportion to their weights, spread as evenly as whole records allow; each task goes through its own
    records in a new random order every time.

    Args:
        sizes: Number of each task's records.
        weights: Share of each task in the stream, in any unit.
        seed: Seed of the orders.
    """
    rngs = [random.Random(f"{seed}/{task}") for task in range(len(sizes))]
    left: list[list[int]] = [[] for _ in sizes]
    drawn = [0] * len(sizes)
    total = sum(weights)
    for draw in count(1):
        # Among the tasks behind their share, the one due first: no task is ever a whole draw off its share.
        behind = [t for t, w in enumerate(weights) if draw * w > drawn[t] * total]
        task = min(behind, key=lambda t: (drawn[t] + 1) / weights[t])
        drawn[task] += 1
        if not left[task]:
            left[task] = rngs[task].sample(range(sizes[task]), sizes[task])
        yield task, left[task].pop()


class MixtureSampler(Sampler[list[tuple[int, int, int]]]):
    """A sampler of endless batches of (number of the draw, task, index) from `mixture`.

    The stream depends only on the sizes, weights and seed. A resumed run thus continues exactly where it stopped, and
    several processes take disjoint batches of the same stream.

    Args:
        sizes, weights, seed: See `mixture`.
        batch_size: Records per batch.
        first: Number of this process's batches that earlier runs have used.
        rank, world: Rank of this process, and number of processes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        batch_size: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes, self.weights, self.seed, self.batch_size = sizes, weights, seed, batch_size
        self.first, self.rank, self.world = first, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        skipped = (self.first * self.world + self.rank) * self.batch_size
        picks = enumerate(mixture(self.sizes, self.weights, self.seed))
        stream = ((draw, *pick) for draw, pick in islice(picks, skipped, None))
        between = (self.world - 1) * self.batch_size
        while True:
            yield list(islice(stream, self.batch_size))
            next(islice(stream, between, between), None)
