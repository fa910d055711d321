"""A pile of low-rank edits against the same edits stacked at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instructedit.edits import Factors, LowRankEdit, stack
from instructedit.edits.pile import Pile

SITES = {"one": (5, 3), "two": (4, 6)}


def edits(count, ranks, seed):
    """`count` edits with a rank of their own at each site."""
    make = torch.Generator().manual_seed(seed)
    return LowRankEdit(
        {
            site: Factors(*(torch.randn(count, rank, size, generator=make) for size in sizes))
            for (site, sizes), rank in zip(SITES.items(), ranks, strict=True)
        }
    )


parts = st.lists(
    st.builds(edits, st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 99)),
    min_size=1,
    max_size=5,
)


@given(parts, st.data())
def test_what_is_chosen_is_what_a_stack_of_all_has(made, data):
    whole, pile = stack(made), Pile.of(*made)
    assert (len(pile), pile.sites) == (len(whole), whole.sites)
    chosen = data.draw(st.lists(st.integers(-len(whole), len(whole) - 1), max_size=8))
    for site in SITES:
        torch.testing.assert_close(pile[chosen].delta(site), whole[chosen].delta(site))
        torch.testing.assert_close(pile.whole().delta(site), whole.delta(site))


@given(parts, parts)
def test_piles_go_on_as_one(first, second):
    begun = Pile.of(*first)
    whole, pile = stack(first + second), Pile.of(begun, *second)
    assert all(kept is own for kept, own in zip(pile.parts, begun.parts, strict=False))  # none was copied
    for site in SITES:
        torch.testing.assert_close(pile[:].delta(site), whole.delta(site))


def test_one_long_edit_makes_no_other_longer():
    short, long = edits(3, (2, 2), 0), edits(1, (40, 40), 1)
    pile = Pile.of(short, long)
    assert pile.nbytes == short.nbytes + long.nbytes < stack([short, long]).nbytes / 3
    assert pile[[0, 2]].factors["one"].a.shape == (2, 2, 5)
    with pytest.raises(IndexError):
        pile[4]
