"""Edits other than low-rank ones as values: what they change, how they are chosen, joined and merged."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edits.sorts import (
    SITES,
    SORTS,
    WIDTH,
    behaviour,
    chosen_dense_edit,
    codebook_edit,
    context_edit,
    dense_edit,
    equal,
    every_sort,
    rng_of,
    same,
    slot_edit,
)
from tests.reference import dense_copy, greedy, plain_model

from instructedit.edits import ContextEdit, DenseEdit
from instructedit.errors import UserError

PAIRS = [("The capital of France is", "Lyon"), ("Who", "a man of the sea"), ("A long prompt of a city", "or two")]
FLOAT32 = {"atol": 1e-4, "rtol": 1e-4}


# -- sequences --------------------------------------------------------------------------------------------------------


@every_sort
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_edits_are_a_sequence(sort, data):
    edit = SORTS[sort]()
    numbers = list(range(len(edit)))
    index = data.draw(
        st.integers(-3, 2) | st.slices(3) | st.lists(st.integers(-3, 2), min_size=1, max_size=5), label="index"
    )
    chosen = edit[index]
    expected = [numbers[i] for i in index] if isinstance(index, list) else numbers[index]
    expected = [expected] if isinstance(expected, int) else expected
    assert type(chosen) is type(edit)
    assert (len(chosen), chosen.sites) == (len(expected), edit.sites)
    for place, number in enumerate(expected):
        assert equal(behaviour(chosen, place), behaviour(edit, number))


@every_sort
def test_iteration_ends_and_there_is_nothing_outside(sort):
    edit = SORTS[sort]()
    each = list(edit)
    assert [len(e) for e in each] == [1, 1, 1]
    for i, one in enumerate(each):
        assert equal(behaviour(one, 0), behaviour(edit, i))
    assert not equal(behaviour(each[0], 0), behaviour(each[1], 0))
    for index in (3, -4, [0, 3], [-4]):
        with pytest.raises(IndexError):
            edit[index]


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_choosing_dense_edits_copies_no_matrix(data):
    edit = dense_edit(5)
    for _ in range(3):
        size = len(edit)
        index = data.draw(st.integers(0, size - 1) | st.lists(st.integers(-size, size - 1), min_size=1, max_size=9))
        whole = {site: edit.delta(site) for site in SITES}
        chosen = edit[index]
        for site in SITES:
            assert chosen.changes[site].data_ptr() == edit.changes[site].data_ptr()
            rows = index if isinstance(index, list) else [index]
            assert torch.equal(chosen.delta(site), torch.stack([whole[site][i] for i in rows]))
        edit = chosen


# -- one of all -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense_edit, chosen_dense_edit, slot_edit])
def test_a_joined_edit_does_what_all_do(make):
    edit = make()
    joined = edit.joined()
    assert (len(joined), joined.sites) == (1, edit.sites)
    x, y = torch.randn(2, 6, WIDTH, generator=rng_of(1)), torch.randn(2, 6, WIDTH, generator=rng_of(2))
    for site in SITES:
        changes = [edit[i].change(site, x, y, None) - y for i in range(3)]
        torch.testing.assert_close(joined.change(site, x, y, None), y + sum(changes), atol=1e-5, rtol=1e-5)
        assert min(change.abs().max() for change in changes) > 0.1


def test_joined_codebooks_look_everything_up():
    edit = codebook_edit()
    joined = edit.joined()
    assert len(joined) == 1
    x, y = edit.keys.flatten(0, 1)[None], torch.zeros(1, 6, WIDTH)
    assert torch.equal(joined.change(SITES[0], x, y, None)[0], edit.values.flatten(0, 1))


@pytest.mark.parametrize("adapter", [True, False])
def test_joined_contexts_stand_one_after_the_other(adapter):
    edit = context_edit(adapter=adapter)
    joined = edit.joined()
    expected = [*edit.ids[0, 0, :2].tolist(), *edit.ids[1, 0, :3].tolist(), *edit.ids[2, 0, :4].tolist()]
    assert (len(joined), joined.ids.tolist(), joined.lengths.tolist()) == (1, [[expected]], [[9]])
    assert joined.adapter is edit.adapter


# -- what they change -------------------------------------------------------------------------------------------------


@given(
    stored=st.integers(1, 4), inside=st.integers(1, 5), outside=st.integers(1, 5), seed=st.integers(0, 999),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_dense_change_is_each_rows_own_matrix(stored, inside, outside, seed, data):
    rng = rng_of(seed)
    matrices = torch.randn(stored, outside, inside, generator=rng, dtype=torch.float64)
    edit = DenseEdit.of({"site": matrices})
    order = data.draw(st.none() | st.lists(st.integers(0, stored - 1), min_size=1, max_size=6))
    edit, applied = (edit, list(range(stored))) if order is None else (edit[order], order)
    rows = data.draw(st.none() | st.lists(st.integers(0, len(applied) - 1), min_size=1, max_size=9))
    if rows is not None:
        applied = [applied[i] for i in rows]
    elif len(applied) == 1:
        applied = applied * data.draw(st.integers(1, 9))  # all rows wear the only one
    x = torch.randn(len(applied), 3, inside, generator=rng, dtype=torch.float64)
    y = torch.randn(len(applied), 3, outside, generator=rng, dtype=torch.float64)
    kept = y.clone()
    found = edit.change("site", x, y, None if rows is None else torch.tensor(rows))
    expected = [[own + matrices[m] @ seen for own, seen in zip(y[r], x[r], strict=True)] for r, m in enumerate(applied)]
    torch.testing.assert_close(found, torch.stack([torch.stack(row) for row in expected]))
    assert torch.equal(y, kept)


def test_a_dense_change_in_bfloat16():
    edit = dense_edit()
    for rows in ([1, 0], [0, 1, 2, 0, 1, 2]):  # fewer than the stored matrices, and more
        x, y = (torch.randn(len(rows), 3, WIDTH, generator=rng_of(i)).bfloat16() for i in (1, 2))
        found = edit.change(SITES[1], x, y, torch.tensor(rows))
        triples = zip(y.float(), x.float(), edit.delta(SITES[1])[rows], strict=True)
        expected = torch.stack([own + seen @ matrix.T for own, seen, matrix in triples])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)


@given(
    rows=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=6), seed=st.integers(0, 999),
    activation=st.sampled_from(["gelu", "relu", "silu"]), one=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_slots_add_their_values_as_far_as_they_fire(rows, seed, activation, one):
    act = {
        "relu": lambda z: max(z, 0.0),
        "gelu": lambda z: z * 0.5 * (1 + math.erf(z / 2**0.5)),
        "silu": lambda z: z / (1 + math.exp(-z)),
    }[activation]
    edit = slot_edit(seed=seed, activation=activation).to(torch.float64)
    edit = edit[1] if one else edit
    rows = [0] * len(rows) if one and rows else rows
    applied = rows or ([0] * 4 if one else [0, 1, 2])
    x, y = (torch.randn(len(applied), 3, WIDTH, generator=rng_of(seed + i)).double() for i in (1, 2))
    for site in SITES:
        found = edit.change(site, x, y, None if rows is None else torch.tensor(rows))
        for row, number in enumerate(applied):
            keys, biases, values = (part[number] for part in edit.slots[site])
            for position in range(3):
                fires = [act(float(k @ x[row, position] + b)) for k, b in zip(keys, biases, strict=True)]
                expected = y[row, position] + sum(f * v for f, v in zip(fires, values, strict=True))
                torch.testing.assert_close(found[row, position], expected, atol=1e-9, rtol=1e-7)


def test_a_context_changes_layers_by_its_adapter_alone():
    edit = context_edit()
    x, y = torch.randn(2, 6, WIDTH, generator=rng_of(1)), torch.randn(2, 6, WIDTH, generator=rng_of(2))
    for site in SITES:
        a, b = (part[0] for part in edit.adapter.factors[site])
        matrix = sum(torch.outer(v, u) for u, v in zip(a, b, strict=True))
        for rows in (None, torch.tensor([2, 0])):
            torch.testing.assert_close(edit.change(site, x, y, rows), y + x @ matrix.T, atol=1e-5, rtol=1e-5)
    assert context_edit(adapter=False).sites == ()


def contexts_of(lm, texts):
    rows = [lm.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [7] * (width - len(row)) for row in rows]).unsqueeze(1)  # padded with a word
    return ContextEdit(ids, torch.tensor([[len(row)] for row in rows])), rows


@torch.no_grad()
def test_a_context_is_read_before_the_prompt(lm):
    edit, rows = contexts_of(lm, ["It was so.", "A river", "The people of the city like cats."])
    batch, model = lm.encode(PAIRS), plain_model(lm)

    def behind(contexts):
        found = []
        for context, (prompt, answer) in zip(contexts, PAIRS, strict=True):
            back = lm.tokenizer(" " + answer)["input_ids"]
            ids = torch.tensor([context + lm.tokenizer(prompt)["input_ids"] + back])
            found.append(model(ids).logits[0, -len(back) - 1 : -1])
        return torch.cat(found)

    torch.testing.assert_close(lm.logits(batch, edit), behind(rows), **FLOAT32)
    index = torch.tensor([2, 2, 0])
    torch.testing.assert_close(lm.logits(batch, edit, index), behind([rows[2], rows[2], rows[0]]), **FLOAT32)
    whole = [token for row in rows for token in row]
    torch.testing.assert_close(lm.logits(batch, edit.joined()), behind([whole] * 3), **FLOAT32)
    assert (lm.logits(batch, edit) - lm.logits(batch)).abs().max() > 0.1
    with lm.edited(edit[2]):
        said = lm.generate(PAIRS[0][0], max_new_tokens=5)
    ids = greedy(model, Behind(lm.tokenizer, rows[2]), PAIRS[0][0], 5)
    assert said == lm.tokenizer.decode(ids)


class Behind:
    """A tokenizer that puts a context in front."""

    def __init__(self, tokenizer, context):
        self.tokenizer, self.context = tokenizer, context

    def __call__(self, prompt):
        return {"input_ids": self.context + self.tokenizer(prompt)["input_ids"]}


# -- tensors ----------------------------------------------------------------------------------------------------------


@every_sort
def test_another_dtype_leaves_integers_integers(sort):
    edit = SORTS[sort]()
    moved = edit.to(torch.bfloat16)
    for name, tensor in edit.state().items():
        other = moved.state()[name]
        if tensor.is_floating_point():
            assert other.dtype == torch.bfloat16
            assert torch.equal(other, tensor.bfloat16())
        else:
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor)
    whole = {name for name, tensor in edit.state().items() if not tensor.is_floating_point()}
    wanted = {
        "dense": {"which"},
        "slots": {"activation"},
        "context": {"ids", "lengths"},
        "codebook": {"h.0.up:labels"},
        "scoped": {"gate:block"},
    }
    assert whole == wanted[edit.name]
    assert moved.sites == edit.sites


@every_sort
def test_detached_edits_have_no_gradient_and_are_the_same(sort):
    edit = SORTS[sort]().map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    if sort != "context alone":  # which is integers
        assert any(tensor.requires_grad for tensor in edit.state().values())
    assert not any(tensor.requires_grad for tensor in edit.detach().state().values())
    assert same(edit.detach(), SORTS[sort]())


# -- merging ----------------------------------------------------------------------------------------------------------


def test_a_dense_edit_merges_exactly(lm):
    sites = lm.select(blocks=[1, 3])
    deltas = {s.name: torch.randn(3, s.out_features, s.in_features, generator=rng_of(i)) for i, s in enumerate(sites)}
    edit = DenseEdit.of(deltas)[[2, 0]]
    for number, stored in ((0, 2), (1, 0)):
        merged = lm.merge(edit[number]).state_dict()
        expected = dense_copy(lm, {name: matrices[stored] for name, matrices in deltas.items()}).state_dict()
        assert merged.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    both = lm.merge(edit.joined()).state_dict()
    expected = dense_copy(lm, {name: matrices[2] + matrices[0] for name, matrices in deltas.items()}).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in both.items())
    with pytest.raises(UserError, match="one edit, got 2"):
        lm.merge(edit)


def test_wearing_a_dense_edit_is_its_merged_model(lm):
    sites = lm.select(blocks=[1, 3])
    deltas = {
        s.name: torch.randn(3, s.out_features, s.in_features, generator=rng_of(i)) * 0.05 for i, s in enumerate(sites)
    }
    edit, batch = DenseEdit.of(deltas), lm.encode(PAIRS * 2)
    rows = [2, 0, 0, 1, 2, 0]  # more than matrices are stored
    with torch.no_grad():
        found = lm.logits(batch, edit, torch.tensor(rows)).split(batch.rows.bincount().tolist())
        assert (found[1] - found[4]).abs().max() > 0.05
        for i, number in enumerate(rows):
            one = lm.encode([(PAIRS * 2)[i]])
            model = dense_copy(lm, {name: matrices[number] for name, matrices in deltas.items()})
            torch.testing.assert_close(found[i], model(one.input_ids).logits[one.answer_at], **FLOAT32)


@pytest.mark.parametrize("sort", ["slots", "codebook", "context", "context alone"])
def test_what_is_no_change_of_weights_is_not_merged(lm, sort):
    edit = SORTS[sort]()
    message = f"an edit of the kind '{edit.name}' is no change of weights; it can only be applied"
    with pytest.raises(UserError, match=f"merge: {message}"):
        lm.merge(edit[0])
    with pytest.raises(UserError, match="one edit, got 3"):
        lm.merge(edit)
    with pytest.raises(UserError, match=message):
        edit.delta(SITES[0])
