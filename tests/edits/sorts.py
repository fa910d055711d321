"""An edit of each sort other than the low-rank ones, made of random numbers, and whether two are the same."""

import pytest
import torch

from instructedit.edits import (
    CodebookEdit,
    ContextEdit,
    DenseEdit,
    Factors,
    Gate,
    LowRankEdit,
    ScopedEdit,
    SlotEdit,
    Slots,
)

SITES = ("h.0.up", "h.0.down")
#: Inputs and outputs of both sites are of one size, so that every sort of edit fits the same tests.
WIDTH = 4


def rng_of(seed):
    return torch.Generator().manual_seed(seed)


def dense_edit(n=3, seed=0):
    return DenseEdit.of(
        {site: torch.randn(n, WIDTH, WIDTH, generator=rng_of(seed + i)) for i, site in enumerate(SITES)}
    )


def chosen_dense_edit():
    """Whose edits stand in another order than what is stored, one of them twice."""
    return dense_edit(4)[[2, 0, 2]]


def slot_edit(n=3, seed=0, activation="relu"):
    rng = rng_of(seed)

    def slots(count):
        return Slots(
            torch.randn(n, count, WIDTH, generator=rng), torch.randn(n, count, generator=rng),
            torch.randn(n, count, WIDTH, generator=rng),
        )  # fmt: skip

    return SlotEdit({site: slots(2 + i) for i, site in enumerate(SITES)}, activation)


def codebook_edit(n=3, seed=0):
    rng = rng_of(seed)
    keys, values = (torch.randn(n, 2, WIDTH, generator=rng) * 9 for _ in range(2))
    radii, labels = torch.rand(n, 2, generator=rng), torch.randint(0, 99, (n, 2, 3), generator=rng)
    return CodebookEdit(SITES[0], keys, values, radii, labels)


def context_edit(n=3, seed=0, adapter=True):
    rng = rng_of(seed)
    ids, lengths = torch.randint(0, 99, (n, 1, 5), generator=rng), torch.arange(n)[:, None] + 2
    shapes = {
        site: (torch.randn(1, 2, WIDTH, generator=rng), torch.randn(1, 2, WIDTH, generator=rng)) for site in SITES
    }
    low_rank = LowRankEdit({site: Factors(*pair) for site, pair in shapes.items()})
    return ContextEdit(ids, lengths, low_rank if adapter else None)


def scoped_edit(n=3, seed=0, entries=1):
    rng = rng_of(seed)
    shapes = {site: tuple(torch.randn(n * entries, 2, WIDTH, generator=rng) for _ in range(2)) for site in SITES}
    keys, projection = torch.randn(n, entries, 3, generator=rng), torch.randn(3, 5, generator=rng)
    gate = Gate(keys, projection, torch.tensor(1.0), torch.tensor(2.0), torch.tensor(1))
    return ScopedEdit(LowRankEdit({site: Factors(*pair) for site, pair in shapes.items()}), gate)


SORTS = {
    "scoped": scoped_edit,
    "dense": dense_edit,
    "chosen dense": chosen_dense_edit,
    "slots": slot_edit,
    "codebook": codebook_edit,
    "context": context_edit,
    "context alone": lambda: context_edit(adapter=False),
}
every_sort = pytest.mark.parametrize("sort", SORTS)


def same(one, other):
    """Bit by bit, in the same order, with what is no tensor."""
    assert type(one) is type(other)
    assert (len(one), one.sites) == (len(other), other.sites)
    states = one.state(), other.state()
    assert states[0].keys() == states[1].keys()
    return all(
        torch.equal(tensor, states[1][name]) and tensor.dtype == states[1][name].dtype
        for name, tensor in states[0].items()
    )


def behaviour(edit, i):
    """All that edit i does: to random inputs and on its own keys; and the tokens that it puts in front.

    A low-rank change, whose products round by how many there are, is taken at its factors, with its place in the scope.
    """
    if isinstance(edit, ScopedEdit):
        return [*(part[i] for factors in edit.changes.factors.values() for part in factors), edit.gate.keys[i]]
    x, y = torch.randn(1, 6, WIDTH, generator=rng_of(5)), torch.randn(1, 6, WIDTH, generator=rng_of(6))
    if isinstance(edit, CodebookEdit):
        x[0, : edit.keys.shape[1]] = edit.keys[i] + 0.01
    done = [edit.change(site, x, y, torch.tensor([i])) for site in edit.sites]
    if isinstance(edit, ContextEdit):
        done += edit.contexts(torch.tensor([i]))
    return done


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
