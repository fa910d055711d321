"""Edits that are put together one after another."""

import functools
import itertools

import pytest
import torch

from instructedit.edits import (
    CodebookEdit,
    ContextEdit,
    DenseEdit,
    Factors,
    Gate,
    IdentityEdit,
    LowRankEdit,
    SlotEdit,
    Slots,
    add,
)
from instructedit.errors import UserError

SITES = ("one", "two")


def low_rank(seed, rank=2, sites=SITES, size=(6, 5)):
    rng = torch.Generator().manual_seed(seed)
    return LowRankEdit(
        {s: Factors(*(torch.randn(1, rank, n, generator=rng, dtype=torch.float64) for n in size)) for s in sites}
    )


def dense(edit):
    return DenseEdit.of({site: edit.delta(site) for site in edit.sites})


@pytest.mark.parametrize("dense_ones", [(), (0,), (1,), (0, 1)])
def test_changes_of_weights_are_summed_wherever_they_are(dense_ones):
    both = low_rank(0, rank=1), low_rank(1, rank=1, sites=("one",))
    total = add(*(dense(each) if i in dense_ones else each for i, each in enumerate(both)))
    assert isinstance(total, DenseEdit) == bool(dense_ones)
    torch.testing.assert_close(total.delta("one"), both[0].delta("one") + both[1].delta("one"))
    torch.testing.assert_close(total.delta("two"), both[0].delta("two"))


def test_what_is_held_does_not_grow_with_the_number_of_edits():
    parts = [low_rank(seed) for seed in range(12)]
    sizes, total = [], None
    for part in parts:
        total = add(total, part)
        sizes.append(sum(tensor.numel() for tensor in total.state().values()))
    assert sizes[0] == 2 * 2 * 11
    assert sizes[1] == sizes[-1] == 2 * 30 + 1  # matrices of 6 × 5, and which edit is which
    for site in SITES:
        torch.testing.assert_close(total.delta(site), sum(part.delta(site) for part in parts))


def test_slots_stand_side_by_side():
    rng = torch.Generator().manual_seed(0)
    shapes = [((1, n, 4), (1, n), (1, n, 4)) for n in (2, 3)]
    one, other = (SlotEdit({"ffn": Slots(*(torch.randn(s, generator=rng) for s in own))}) for own in shapes)
    x, y = torch.randn(2, 3, 4, generator=rng), torch.zeros(2, 3, 4)
    rows = torch.zeros(2, dtype=torch.long)
    expected = one.change("ffn", x, y, rows) + other.change("ffn", x, y, rows)
    torch.testing.assert_close(add(one, other).change("ffn", x, y, rows), expected)
    with pytest.raises(UserError, match="do not go together"):
        add(one, SlotEdit(other.slots, "relu"))


def codebook(*entries):
    """Entries of (key, value, radius, label)."""
    keys, values, radii, labels = zip(*entries, strict=True)
    parts = torch.tensor(keys)[None, :, None], torch.tensor(values)[None, :, None]
    return CodebookEdit("layer", *parts, torch.tensor(radii)[None], torch.tensor(labels)[None, :, None])


def test_entries_come_into_a_codebook_by_graces_rules():
    entries = [(0.0, 1.0, 1.0, 1), (10.0, 2.0, 1.0, 2), (10.5, 3.0, 1.0, 2), (1.0, 4.0, 1.0, 3)]
    one_by_one = functools.reduce(add, (codebook(entry) for entry in entries))
    at_once = codebook(*entries).joined()
    for found, expected in zip(one_by_one.state().values(), at_once.state().values(), strict=True):
        torch.testing.assert_close(found, expected)
    assert one_by_one.keys.flatten().tolist() == [0, 10, 1]  # the third widened the second's ball
    assert one_by_one.radii[0].tolist() == pytest.approx([0.5, 1.0, 0.5], abs=1e-4)


def test_contexts_follow_each_other():
    one, other = (ContextEdit(torch.tensor([[ids]]), torch.tensor([[len(ids)]])) for ids in ([1, 2], [3]))
    (ids,) = add(one, other).contexts(torch.tensor([0]))
    assert ids.tolist() == [1, 2, 3]


def test_what_cannot_be_put_together_is_one_line():
    slots = SlotEdit({"one": Slots(torch.ones(1, 1, 2), torch.ones(1, 1), torch.ones(1, 1, 2))})
    with pytest.raises(UserError, match="'low_rank' and 'slots' cannot be put together"):
        add(low_rank(0), slots)
    with pytest.raises(UserError, match="several edits"):
        add(None, IdentityEdit(2))
    assert add(None, slots) is add(IdentityEdit(1), slots) is add(slots, IdentityEdit(1)) is slots


def test_contexts_with_and_without_a_gate_or_an_adapter_are_no_one_edit():
    """The gate of one, or its adapter, would be lost or hold for the other."""
    ids, lengths = torch.ones(1, 1, 3, dtype=torch.long), torch.tensor([[3]])
    gate = Gate(torch.zeros(1, 1, 2), torch.zeros(2, 4), torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1))
    kinds = [ContextEdit(ids, lengths, *rest) for rest in ((), (None, gate), (low_rank(0),), (low_rank(0), gate))]
    for first, second in itertools.permutations(kinds, 2):
        with pytest.raises(UserError, match="do not go together"):
            add(first, second)
    assert all(len(add(one, one)) == 1 for one in kinds)
