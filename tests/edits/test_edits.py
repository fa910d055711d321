"""Edits as values: what they change, how they are combined, and their way to disk and back."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.reference import dense, plain_model, random_factors

from instructedit.edits import ADAPTER, Factors, IdentityEdit, LowRankEdit, SlotEdit, Slots, load_edit, stack
from instructedit.errors import UserError
from instructedit.lm import TokenBatch

SITES = ("h.0.up", "h.0.down")
SIZES = st.integers(1, 6)


@st.composite
def low_rank_edits(draw, count=None, sizes=None, dtype=torch.float64):
    """Edits of two sites of different shape and rank."""
    n = count or draw(st.integers(1, 4))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    factors = {}
    for site, (inside, outside) in zip(SITES, sizes or ((draw(SIZES), draw(SIZES)) for _ in SITES), strict=True):
        rank = draw(st.integers(0, 5))
        sides = [torch.randn(n, rank, size, generator=rng, dtype=dtype) for size in (inside, outside)]
        factors[site] = Factors(*sides)
    return LowRankEdit(factors)


def deltas(edit, site):
    """Σ_t b_t a_tᵀ of each edit, token by token, [n, out, in]."""
    a, b = edit.factors[site]
    total = a.new_zeros(len(a), b.shape[-1], a.shape[-1])
    for i, t in itertools.product(range(len(a)), range(a.shape[1])):
        total[i] += torch.outer(b[i, t], a[i, t])
    return total


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_change_is_that_of_the_dense_delta(data):
    edit = data.draw(low_rank_edits())
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(edit) - 1), min_size=1, max_size=5)))
    for site in SITES:
        matrices = deltas(edit, site)
        torch.testing.assert_close(edit.delta(site), matrices)
        x = torch.randn(len(rows), 3, matrices.shape[2], dtype=torch.float64)
        y = torch.randn(len(rows), 3, matrices.shape[1], dtype=torch.float64)
        expected = torch.stack([y[r] + x[r] @ matrices[e].T for r, e in enumerate(rows.tolist())])
        kept = y.clone()
        torch.testing.assert_close(edit.change(site, x, y, rows), expected)
        assert torch.equal(y, kept)


@given(edit=low_rank_edits())
@settings(max_examples=50, deadline=None)
def test_joined_does_what_all_do(edit):
    joined = edit.joined()
    assert (len(joined), joined.sites) == (1, edit.sites)
    for site in SITES:
        torch.testing.assert_close(joined.delta(site)[0], deltas(edit, site).sum(0))


@given(edit=low_rank_edits())
@settings(max_examples=50, deadline=None)
def test_edits_are_a_sequence(edit):
    each = [edit[i] for i in range(len(edit))]
    assert [len(e) for e in each] == [1] * len(edit)
    for site in SITES:
        matrices = deltas(edit, site)
        torch.testing.assert_close(torch.cat([e.delta(site) for e in each]), matrices)
        torch.testing.assert_close(torch.cat([e.delta(site) for e in edit]), matrices)
        torch.testing.assert_close(edit[-1].delta(site), matrices[-1:])
        torch.testing.assert_close(edit[::2].delta(site), matrices[::2])
    for index in (len(edit), -len(edit) - 1):
        with pytest.raises(IndexError):
            edit[index]


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_stack_keeps_every_edit(data):
    edits = [data.draw(low_rank_edits(sizes=((3, 5), (4, 2)))) for _ in range(3)]  # the ranks differ
    whole = stack(edits)
    assert len(whole) == sum(map(len, edits))
    for site in SITES:
        torch.testing.assert_close(whole.delta(site), torch.cat([deltas(e, site) for e in edits]))


@given(edit=low_rank_edits(), rank=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_compressed_is_the_best_of_its_rank(edit, rank):
    small = edit.compressed(rank)
    for site in SITES:
        assert small.factors[site].a.shape[1] <= rank
        assert small.factors[site].a.shape[1] == small.factors[site].b.shape[1]
        for whole, found in zip(deltas(edit, site), small.delta(site), strict=True):
            size = torch.linalg.svdvals(whole)
            # Eckart–Young: no matrix of this rank comes closer; with the full rank nothing is lost.
            torch.testing.assert_close((whole - found).norm().item(), size[rank:].norm().item(), atol=1e-5, rtol=1e-5)


def test_map_reaches_every_tensor():
    edit = LowRankEdit({s: Factors(torch.ones(2, 1, 3, requires_grad=True), torch.ones(2, 1, 4)) for s in SITES})
    assert edit.delta(SITES[0]).requires_grad
    assert not edit.detach().delta(SITES[0]).requires_grad
    assert {t.dtype for t in edit.to(torch.bfloat16).state().values()} == {torch.bfloat16}
    assert torch.equal(edit.map(lambda t: 2 * t).delta(SITES[1]), 4 * edit.delta(SITES[1]))


def test_change_in_bfloat16():
    edit = LowRankEdit({"site": Factors(torch.randn(2, 3, 4), torch.randn(2, 3, 5))})
    x, y = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 5).bfloat16()
    for applied in (edit, edit[0]):
        found = applied.change("site", x, y, torch.tensor([0, 0]))
        expected = y.float() + x.float() @ edit.delta("site")[0].T
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)


# -- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edit():
    ranks = dict(zip(SITES, (1, 3), strict=True))
    factors = {site: Factors(torch.randn(2, rank, 4), torch.randn(2, rank, 3)) for site, rank in ranks.items()}
    return LowRankEdit(factors)


@pytest.mark.parametrize("choose", [lambda e: e, lambda e: e[1], lambda e: e.joined(), lambda e: IdentityEdit(3)])
def test_disk_and_back(edit, tmp_path, choose):
    chosen = choose(edit)
    chosen.save_pretrained(tmp_path / "new" / "folder", base_model="tiny")
    again = load_edit(tmp_path / "new" / "folder")
    assert type(again) is type(chosen)
    assert (len(again), set(again.sites)) == (len(chosen), set(chosen.sites))
    assert again.state().keys() == chosen.state().keys()
    assert all(torch.equal(tensor, chosen.state()[name]) for name, tensor in again.state().items())
    assert json.loads((tmp_path / "new/folder/edit.json").read_text())["base_model"] == "tiny"


def test_only_one_edit_is_an_adapter(edit, tmp_path):
    edit.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    edit.joined().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("missing", ["edit.json", "edit.safetensors"])
def test_missing_files_are_named(edit, tmp_path, missing):
    with pytest.raises(UserError, match=r"nowhere: no saved edit here \(edit\.json is missing\)"):
        load_edit(tmp_path / "nowhere")
    edit.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing"):
        load_edit(tmp_path)


DAMAGE = {
    "cut json": ("edit.json", b'{"edit": "low_'),
    "no text": ("edit.json", b"\xff\xfe\x00\x9c"),
    "another json": ("edit.json", b"[1, 2]"),
    "no kind": ("edit.json", b"{}"),
    "a kind that is no name": ("edit.json", b'{"edit": ["low_rank"]}'),
    "unknown kind": ("edit.json", b'{"edit": "no_such_edit"}'),
    "empty tensors": ("edit.safetensors", b""),
    "cut tensors": ("edit.safetensors", None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_by_name(edit, tmp_path, name):
    edit.save_pretrained(tmp_path)
    file, content = DAMAGE[name]
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) - 9] if content is None else content)
    with pytest.raises(UserError, match="no_such_edit" if name == "unknown kind" else str(tmp_path)):
        load_edit(tmp_path)


@pytest.mark.parametrize("key", ["h.0.up:a", "h.0.down:b"])
def test_tensors_that_do_not_belong_together_are_refused(edit, tmp_path, key):
    edit.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "edit.safetensors")
    for broken in ({**tensors, key: tensors[key][:1]}, {k: v for k, v in tensors.items() if k != key}):
        save_file({k: v.contiguous() for k, v in broken.items()}, tmp_path / "edit.safetensors")
        with pytest.raises(UserError, match=str(tmp_path)):
            load_edit(tmp_path)


def test_peft_loads_a_saved_edit(lm, tmp_path):
    peft = pytest.importorskip("peft")
    sites = lm.select(blocks=[1, 3])
    factors = random_factors(sites, 2, 2)
    factors[sites[0].name] = tuple(f[:, :1] for f in factors[sites[0].name])  # the ranks differ
    edit = LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})
    ids = torch.tensor([lm.tokenizer("The capital of France is Lyon")["input_ids"]])
    for number, single in enumerate((edit[1], edit.joined())):
        single.save_pretrained(tmp_path / str(number))
        merged = lm.merge(single)
        for name, layer in ((s.name, merged.get_submodule(s.name)) for s in sites):
            change = layer.weight - lm.model.get_submodule(name).weight
            wanted = dense(factors, 1)[name] if number == 0 else dense(factors, 0)[name] + dense(factors, 1)[name]
            wanted = wanted if isinstance(layer, torch.nn.Linear) else wanted.T
            torch.testing.assert_close(change, wanted, atol=1e-6, rtol=1e-4)
        adapted = peft.PeftModel.from_pretrained(plain_model(lm), tmp_path / str(number)).eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=2e-5, rtol=1e-4)


def edits_of(lm, count, block=1, seed=0):
    factors = random_factors(lm.select(blocks=[block]), count, 2, 0.5, seed)
    return LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})


@pytest.mark.parametrize("save", [LowRankEdit.save_pretrained, lambda edit, folder, lm: lm.save(edit, folder)])
@pytest.mark.parametrize("count", [2, 3])
def test_no_adapter_of_an_earlier_edit_stays_in_the_folder(lm, tmp_path, save, count, recwarn):
    edits_of(lm, 1).save_pretrained(tmp_path)
    assert all((tmp_path / name).is_file() for name in ADAPTER)
    save(edits_of(lm, count), tmp_path, **{} if save is LowRankEdit.save_pretrained else {"lm": lm})
    assert not any((tmp_path / name).exists() for name in ADAPTER)
    assert len(load_edit(tmp_path)) == count
    assert not [one for one in recwarn if "PEFT" in str(one.message)]


def test_an_edit_is_saved_as_it_is_whatever_is_applied(lm, tmp_path):
    with lm.edited(edits_of(lm, 3, seed=1)):
        lm.save(edits_of(lm, 1), tmp_path)
    assert all((tmp_path / name).is_file() for name in ADAPTER)


def test_a_merged_model_has_one_edit_alone(lm):
    with lm.edited(edits_of(lm, 1)), pytest.raises(UserError, match="merge outside of `edited`"):
        lm.merge(edits_of(lm, 1))  # the copy would have both


def test_a_change_of_what_is_no_linear_layer_is_not_dropped_by_merging(lm):
    name = f"{lm.forward.block_name(1)}.mlp"
    edit = LowRankEdit({name: Factors(torch.ones(1, 1, 32), torch.ones(1, 1, 32))})
    with pytest.raises(UserError, match=f"{name} is no linear layer"):
        lm.merge(edit)


@pytest.mark.parametrize(
    "edit", [IdentityEdit(3), LowRankEdit({"a": Factors(torch.rand(3, 1, 2), torch.rand(3, 1, 2))})]
)
def test_indices_in_a_list_count_from_the_end_as_one_index_does(edit):
    for name, tensor in edit[[-1, 0]].state().items():
        assert torch.equal(tensor, edit[[2, 0]].state()[name])
    with pytest.raises(IndexError):
        edit[[3]]


# -- no edit ----------------------------------------------------------------------------------------------------------


def test_no_edit_is_a_sequence_of_edits_that_change_nothing():
    edit = IdentityEdit(3)
    assert (len(edit), edit.sites, len(edit.joined())) == (3, (), 1)
    assert (len(edit[0]), len(edit[-1]), len(edit[1:])) == (1, 1, 2)
    assert len(list(itertools.islice(edit, 10))) == 3
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    assert torch.equal(edit.change("any", x, y, torch.tensor([0, 1])), y)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_model_wears_no_edit(lm, threads):
    torch.set_num_threads(threads)
    batch = TokenBatch.cat([lm.encode([("A", "b c"), ("The capital of", "it")])] * 2)
    said = lm.logits(batch)
    assert torch.equal(lm.logits(batch, IdentityEdit(4)), said)
    with lm.edited(None):
        said = lm.logits(batch)
    with lm.edited(IdentityEdit(1)):
        assert torch.equal(lm.logits(batch), said)
    merged = lm.merge(IdentityEdit(1)).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in lm.model.state_dict().items())


# -- ranks, and the range of float16 -----------------------------------------------------------------------------------


def padded_edit():
    """Two edits, of ranks 3 and 5, side by side."""
    one, other = (random_factors([SITE], 1, rank, seed=rank)["site"] for rank in (3, 5))
    return stack([LowRankEdit({"site": Factors(*one)}), LowRankEdit({"site": Factors(*other)})])


class SITE:
    name, in_features, out_features = "site", 12, 9


@pytest.mark.parametrize(("chosen", "rank"), [(0, 3), (1, 5)])
def test_an_edit_is_saved_without_the_padding_of_its_batch(tmp_path, chosen, rank):
    edit = padded_edit()[chosen]
    assert edit.factors["site"].a.shape[1] == 5
    edit.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == rank
    saved = load_edit(tmp_path)
    assert saved.factors["site"].a.shape[1] == rank
    torch.testing.assert_close(saved.delta("site"), edit.delta("site"))


def test_no_saved_rank_is_above_that_of_the_matrix(tmp_path):
    edit = LowRankEdit({"site": Factors(*random_factors([SITE], 7, 4)["site"])}).joined()  # rank 28 of a 9 × 12 matrix
    edit.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (saved[f"base_model.model.site.lora_{part}.weight"] for part in "AB")
    assert (a.shape, b.shape) == ((9, 12), (9, 9))
    torch.testing.assert_close(b @ a, edit.delta("site")[0], atol=1e-5, rtol=1e-5)


def test_an_edit_of_nothing_can_be_saved(tmp_path):
    edit = padded_edit().map(torch.zeros_like)[0]
    edit.save_pretrained(tmp_path)
    assert not load_edit(tmp_path).delta("site").any()


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(UserError, match=f"rank {rank}"):
        padded_edit().compressed(rank)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 0])])
def test_products_that_leave_the_range_of_float16_and_come_back(rows):
    """a·x is 640,000, and b so small that the change is about 6."""
    edit = LowRankEdit({"site": Factors(torch.full((2, 1, 64), 100.0), torch.full((2, 1, 5), 1e-5))})
    x, y = torch.full((2, 3, 64), 100.0, dtype=torch.float16), torch.ones(2, 3, 5, dtype=torch.float16)
    for applied, which in ((edit, rows), (edit[0], None)):
        found = applied.change("site", x, y, which)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, torch.full_like(y, 7.4), atol=1e-2, rtol=0)


def test_slots_that_leave_the_range_of_float16_and_come_back():
    slots = Slots(torch.full((1, 1, 64), 100.0), torch.zeros(1, 1), torch.full((1, 1, 64), 1e-5))
    x = torch.full((1, 3, 64), 100.0, dtype=torch.float16)
    found = SlotEdit({"site": slots}, "relu").change("site", x, torch.ones_like(x), None)
    torch.testing.assert_close(found, torch.full_like(x, 7.4), atol=1e-2, rtol=0)
