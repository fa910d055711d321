"""Balanced mixing of task streams, the same from any point on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

from torch.utils.data import Sampler


def mixture(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Iterator[tuple[int, int]]:
    """An endless stream of (task, index of a record).

    Tasks come in the proportion of their weights, as evenly spread as whole records allow; each task goes through its
    own records in a new random order every time.

    Args:
        sizes: Records of each task.
        weights: Share of each task in the stream, in any unit.
        seed: Of the orders.
    """
    rngs = [random.Random(f"{seed}/{task}") for task in range(len(sizes))]
    left: list[list[int]] = [[] for _ in sizes]
    drawn = [0] * len(sizes)
    total = sum(weights)
    for draw in count(1):
        # Of the tasks that are behind, the one whose next turn is due first: no task is ever a whole draw off.
        behind = [t for t, w in enumerate(weights) if draw * w > drawn[t] * total]
        task = min(behind, key=lambda t: (drawn[t] + 1) / weights[t])
        drawn[task] += 1
        if not left[task]:
            left[task] = rngs[task].sample(range(sizes[task]), sizes[task])
        yield task, left[task].pop()


class MixtureSampler(Sampler[list[tuple[int, int, int]]]):
    """Endless batches of (number of the draw, task, index) from `mixture`.

    The stream depends on the sizes, weights and seed alone. So a resumed run goes on exactly where it stopped, and of
    several processes each takes its own batches, no record twice.

    Args:
        sizes, weights, seed: See `mixture`.
        batch_size: Records a batch.
        first: Batches of this process that earlier runs have used.
        rank, world: This process and how many there are.
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
