"""A gate that matches token by token, against its formula one pair at a time."""

import math

import pytest
import torch

from instructedit.edits import MatchGate
from instructedit.edits import gates as module

HIDDEN, SIZE, WIDTH = 6, 3, 4


class Known:
    """Prompts whose states are given, [hidden] at the end and [seq, hidden] at tokens."""

    def __init__(self, last, tokens):
        self.last, self.rows = last, tokens

    def __call__(self, block):
        assert block == 5
        return torch.stack(self.last)

    def tokens(self, block):
        assert block == 2
        there = [torch.ones(len(row), dtype=torch.bool) for row in self.rows]
        return tuple(torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (self.rows, there))


def drawn(rng, *sizes):
    return torch.randn(*sizes, generator=rng, dtype=torch.float64)


def prompts_of(rng, lengths):
    return Known([drawn(rng, 2 * HIDDEN) for _ in lengths], [drawn(rng, n, HIDDEN) for n in lengths])


def gate_of(rng, lengths, edits):
    """Entries of so many tokens each, of so many edits."""
    tokens = [torch.nn.functional.normalize(drawn(rng, n, WIDTH), dim=-1) for n in lengths]
    weights = [drawn(rng, n).softmax(-1) for n in lengths]
    keys, projection, token_projection = drawn(rng, len(lengths), SIZE), drawn(rng, SIZE, 12), drawn(rng, WIDTH, HIDDEN)
    padded = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (tokens, weights)]
    levels = (torch.tensor(value, dtype=torch.float64) for value in (3.0, 0.02, 4.0, 1.7, 0.3))
    gate = MatchGate(
        *(part.unflatten(0, (edits, -1)) for part in (keys, *padded)), projection, token_projection,
        drawn(rng, 12), drawn(rng, HIDDEN), *levels, torch.tensor(5), torch.tensor(2),
    )  # fmt: skip
    return gate, tokens, weights


def logit(gate, key, tokens, weights, last, states, entries):
    """By the formula, in loops."""
    distance = sum((a - b) ** 2 for a, b in zip(gate.projection @ last, key, strict=True))
    words = [gate.token_projection @ state for state in states]
    matched = sum(w * max(t @ x / x.norm() for x in words) for t, w in zip(tokens, weights, strict=True))
    matter = torch.tensor([sum(a * x for a, x in zip(gate.importance, state, strict=True)).exp() for state in states])
    covered = sum(v * max(t @ x / x.norm() for t in tokens) for x, v in zip(words, matter / matter.sum(), strict=True))
    opened = sum(o * a for o, a in zip(gate.opening, last, strict=True))
    missing = gate.sharpness * (1 - matched) + gate.backward * (1 - covered)
    return gate.bias + opened - gate.scale * distance - missing - gate.crowd * math.log(entries)


@pytest.mark.parametrize("edits", [1, 2, 4])
def test_scores_are_those_of_the_formula_pair_by_pair(edits, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    prompts = prompts_of(rng, [3, 1, 7])
    gate, tokens, weights = gate_of(rng, [2, 5, 1, 3], edits)
    rows = torch.tensor([0, edits - 1, edits // 2])
    entries = 4 // edits
    keys = gate.keys.flatten(0, 1)
    expected = torch.tensor(
        [
            [
                logit(gate, keys[i], tokens[i], weights[i], prompts.last[q], prompts.rows[q], entries)
                for i in range(int(row) * entries, int(row) * entries + entries)
            ]
            for q, row in enumerate(rows)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(gate.scores(prompts, rows), expected)
    monkeypatch.setattr(module, "_ROOM", 1)  # a row at a time
    torch.testing.assert_close(gate.scores(prompts, rows), expected)


def test_padding_of_requests_and_of_prompts_takes_no_part():
    rng = torch.Generator().manual_seed(1)
    prompts, more = prompts_of(rng, [2]), prompts_of(rng, [9])
    gate, _, _ = gate_of(rng, [2, 5], 2)
    zero = torch.tensor([0])
    alone = gate.select([0])
    narrow = alone._replace(tokens=alone.tokens[:, :, :2], weights=alone.weights[:, :, :2])
    both = Known(prompts.last + more.last, prompts.rows + more.rows)
    expected = narrow.scores(prompts, zero)
    torch.testing.assert_close(alone.scores(prompts, zero), expected)
    torch.testing.assert_close(alone.scores(both, torch.tensor([0, 0]))[:1], expected)


def test_entries_are_joined_chosen_and_put_beside_each_other():
    rng = torch.Generator().manual_seed(2)
    prompts = prompts_of(rng, [3, 4])
    gate, _, _ = gate_of(rng, [2, 5, 1, 3], 4)
    rows = torch.tensor([0, 0])
    apart = torch.cat([gate.scores(prompts, rows + i) for i in range(4)], -1) - gate.crowd * math.log(4)
    torch.testing.assert_close(gate.joined().scores(prompts, rows), apart)
    first, second = gate.select([0, 1]), gate.select([3, 2])
    narrow = second._replace(tokens=second.tokens[:, :, :3], weights=second.weights[:, :, :3])
    pairs = first.beside(narrow)
    assert pairs.keys.shape[:2] == (2, 2)
    expected = torch.stack([apart[:, [0, 3]][0], apart[:, [1, 2]][1]]) + gate.crowd * math.log(2)
    torch.testing.assert_close(pairs.scores(prompts, torch.tensor([0, 1])), expected)
