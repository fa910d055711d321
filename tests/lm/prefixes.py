"""States of rows from the prefix cache of a model that is opened again, and from a plain forward pass."""

import torch

from instructedit.lm import FrozenLM
from instructedit.lm.cache.folder import SHARD
from instructedit.lm.cache.memory import forward_pass
from instructedit.lm.tokens import rows_of

ROWS = [[5, 6, 7], [5, 6, 7, 8, 9, 10], [11], [300, 2]]
TOKENS = sum(map(len, ROWS))
HIDDEN = 32
FORWARD = forward_pass(torch.device("cpu"))


def opened(lm, folder, **options):
    """The same model again, as another run finds it."""
    return FrozenLM(lm.model, lm.tokenizer, lm.name, cache_dir=folder, **options)


def shards(folder):
    return sorted(folder.rglob(f"*{SHARD}"))


def plain(lm, rows, block):
    """What enters the block in a whole forward pass of each row alone, from the model itself."""
    with torch.no_grad():
        return [lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[block][0] for ids in rows]


def asked(lm, rows=ROWS, block=2):
    states = lm.prefixes.of(rows_of(rows), block)
    return [states[i, : len(ids)] for i, ids in enumerate(rows)]


def filled(lm, folder, rows=ROWS, block=2, **options):
    """Rows written by a first run, and what it was given."""
    first = opened(lm, folder, **options)
    states = asked(first, rows, block)
    first.cache.flush()
    return states


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
