"""T-Patcher: which patches it makes, the terms of its loss written out, and that patches fire where they should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import random_lm
from tests.reference import answer_logits, edit_loss, plain_model, relative, tokens

from instructedit.editors import build_editor
from instructedit.errors import UserError
from instructedit.records import EditRequest
from instructedit.tasks.texts import read_texts

#: Targets of one, two and several tokens.
PAIRS = [("The capital of France is", "in"), ("Who", "in the"), ("A long prompt of a city", "a man of the sea")]
REQUESTS = [EditRequest(*pair) for pair in PAIRS]
FLOAT32 = {"atol": 1e-4, "rtol": 1e-4}
#: A rate makes it the published method: values start with length 1, and everything moves at that rate.
SMALL = {"text": "tiny", "memory": 150, "largest": 40, "lr": 0.01}


def built(lm, **options):
    return build_editor("t_patcher", lm, **{**SMALL, **options})


def slots_of(editor, edit):
    assert edit.sites == (editor.module,)
    return edit.slots[editor.module]


def sizes(lm):
    return [len(tokens(lm.tokenizer, *pair)[1]) for pair in PAIRS]


def inputs_of(lm, module, ids):
    """What the feed-forward layer of a plain model sees, [tokens, hidden]."""
    model, seen = plain_model(lm), []
    model.get_submodule(module).register_forward_hook(lambda _, args, out: seen.append(args[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return seen[0]


def queries_of(lm, module, pair):
    """What it sees where each token of the target is due."""
    front, back = tokens(lm.tokenizer, *pair)
    return inputs_of(lm, module, front + back)[len(front) - 1 : -1]


def memory_of(lm, module, text, places):
    found = []
    for document in read_texts(text):
        found += inputs_of(lm, module, lm.tokenizer(document)["input_ids"][: lm.max_length])
        if len(found) >= places:
            break
    return torch.stack(found[:places])


def mean_of_largest(terms, count):
    kept = sorted(terms, key=torch.Tensor.item)[-count:]
    return sum(kept) / len(kept)


def scope_loss_by_hand(keys, biases, queries, memory, largest, a, m, beta, gamma):
    """a·l_a + m·(l_m1 + l_m2) of one request, term by term."""
    total = 0
    for k, b, q in zip(keys, biases, queries, strict=True):
        fires = k @ q + b
        l_a = torch.exp(-fires)
        l_m1 = mean_of_largest([torch.exp(k @ place + b - beta) for place in memory], largest)
        l_m2 = mean_of_largest([torch.exp(k @ (place - q) - gamma) for place in memory], largest)
        total = total + a * l_a + m * (l_m1 + l_m2)
    return total / len(queries)


# -- which patches ----------------------------------------------------------------------------------------------------


def test_there_are_as_many_patches_as_target_tokens_and_no_other_one_fires(lm):
    assert sizes(lm)[:2] == [1, 2]
    assert sizes(lm)[2] > 2
    editor = built(lm, steps=3)
    keys, biases, values = slots_of(editor, editor.edit(REQUESTS))
    assert keys.shape == values.shape == (3, max(sizes(lm)), 32)
    assert biases.shape == keys.shape[:2]
    assert values.any(-1).sum(-1).tolist() == sizes(lm)
    for i, size in enumerate(sizes(lm)):
        assert values[i, :size].any(-1).all()
        assert not values[i, size:].any()
        alone = slots_of(editor, editor.edit(REQUESTS[i : i + 1]))
        assert alone.keys.shape[1] == size
        for together, single in zip((keys, biases, values), alone, strict=True):
            torch.testing.assert_close(together[i, :size], single[0], atol=1e-3, rtol=1e-3)


def test_a_patch_starts_at_what_the_layer_sees_where_its_token_is_due(lm):
    editor = built(lm, steps=0)
    keys, biases, values = slots_of(editor, editor.edit(REQUESTS))
    assert not biases.any()
    for i, (pair, size) in enumerate(zip(PAIRS, sizes(lm), strict=True)):
        queries = queries_of(lm, editor.module, pair)
        assert len(queries) == size
        for patch, q in enumerate(queries):
            k = keys[i, patch]
            torch.testing.assert_close(k @ q, torch.tensor(1.0), **FLOAT32)
            torch.testing.assert_close(torch.nn.functional.cosine_similarity(k, q, 0), torch.tensor(1.0), **FLOAT32)
    drawn = values[0, 0]
    assert 0.5 < drawn.norm() < 2
    assert all(torch.equal(v, drawn) for i, size in enumerate(sizes(lm)) for v in values[i, :size])
    other = slots_of(editor, built(lm, steps=0, seed=1).edit(REQUESTS)).values[0, 0]
    assert not torch.equal(drawn, other)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_patched_model_adds_what_its_patches_say(lm, activation):
    editor = built(lm, steps=3, activation=activation)
    edit = editor.edit(REQUESTS)
    slots, act, found = slots_of(editor, edit), getattr(torch.nn.functional, activation), []
    for i, (pair, size) in enumerate(zip(PAIRS, sizes(lm), strict=True)):
        model, (keys, biases, values) = plain_model(lm), (part[i, :size] for part in slots)

        def add(_, args, output, keys=keys, biases=biases, values=values):
            return output + sum(
                act(args[0] @ k + b).unsqueeze(-1) * v for k, b, v in zip(keys, biases, values, strict=True)
            )

        model.get_submodule(editor.module).register_forward_hook(add)
        found.append(answer_logits(model, lm.tokenizer, *pair).detach())
    torch.testing.assert_close(lm.logits(lm.encode(PAIRS), edit), torch.cat(found), **FLOAT32)


def test_the_last_feed_forward_layer_is_patched_and_no_two(lm):
    assert built(lm).module == lm.select(blocks=[3])[0].mlp
    first, second = (lm.select(blocks=[block])[0].mlp for block in (1, 2))
    assert built(lm, blocks=[1]).module == first
    with pytest.raises(UserError, match=rf"'t_patcher' patches one feed-forward layer, got {first}, {second}"):
        built(lm, blocks=[1, 2])


# -- the loss ---------------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 3), patches=st.integers(1, 3), places=st.integers(1, 12), largest=st.integers(1, 15),
    a=st.floats(0, 3), m=st.floats(0, 12), beta=st.floats(-4, 2), gamma=st.floats(-4, 2), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_scope_loss_is_its_three_terms(tiny_lm, size, patches, places, largest, a, m, beta, gamma, seed):
    rng = torch.Generator().manual_seed(seed)
    editor = build_editor("t_patcher", tiny_lm, largest=largest, a=a, m=m, beta=beta, gamma=gamma)
    editor._memory = memory = torch.randn(places, 4, generator=rng)
    keys, q = (torch.randn(size, patches, 4, generator=rng) for _ in range(2))
    biases = torch.randn(size, patches, generator=rng)
    real = torch.arange(patches) < torch.randint(1, patches + 1, (size, 1), generator=rng)
    found = editor._scope_losses(keys, biases, q * real.unsqueeze(-1), real)
    expected = []
    for i, own in enumerate(real):
        parts = (part[i][own] for part in (keys, biases, q))
        expected.append(scope_loss_by_hand(*parts, memory, largest, a, m, beta, gamma))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def tiny_lm(tokenizer):
    return random_lm("gpt2", tokenizer, layers=1)


@pytest.mark.parametrize("stop", [0.0, 1e9])
def test_patches_are_trained_on_the_edit_loss_and_the_scope_loss(lm, stop):
    """Against a loop of its own, one request at a time, until the edit loss alone is low enough."""
    options = {"steps": 4, "lr": 0.02, "a": 0.7, "m": 3.0, "beta": -2.0, "gamma": -2.5, "stop_below": stop}
    editor = built(lm, **options)
    found = slots_of(editor, editor.edit(REQUESTS))
    start = slots_of(editor, built(lm, steps=0).edit(REQUESTS))
    memory = memory_of(lm, editor.module, "tiny", SMALL["memory"])
    terms = (memory, SMALL["largest"], 0.7, 3.0, -2.0, -2.5)
    for i, (pair, size) in enumerate(zip(PAIRS, sizes(lm), strict=True)):
        keys, biases, values = (part[i, :size].clone().requires_grad_() for part in start)
        queries = queries_of(lm, editor.module, pair)
        adam = torch.optim.Adam([keys, biases, values], lr=0.02)
        for _ in range(4):
            model = plain_model(lm)

            def add(_, args, output, k=keys, b=biases, v=values):
                return output + torch.nn.functional.gelu(args[0] @ k.T + b) @ v

            model.get_submodule(editor.module).register_forward_hook(add)
            wrong = edit_loss(model, lm.tokenizer, *pair)
            if wrong.item() < stop:
                break
            adam.zero_grad()
            (wrong + scope_loss_by_hand(keys, biases, queries, *terms)).backward()
            adam.step()
        for part, first, expected in zip(found, start, (keys, biases, values), strict=True):
            assert torch.equal(part[i, :size], first[i, :size]) == bool(stop)
            assert relative(part[i, :size], expected) < 1e-3


def assert_same_places(found, expected):
    """In any order: texts are read by length, and a memory is a set."""
    assert found.shape == expected.shape
    distances = (found.unsqueeze(1) - expected).norm(dim=-1)
    assert distances.min(0).values.max() < 1e-4
    assert distances.min(1).values.max() < 1e-4


def test_memory_is_of_the_first_tokens_of_the_text(lm, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(
        "The people of the city like cats.\n\nWho\n\nOne river in the city and another one.\n\nIt was so.\n"
    )
    for text, places in (("tiny", 300), (str(file), 20), (str(file), 25)):
        editor = built(lm, steps=1, text=text, memory=places, largest=10)
        editor.edit(REQUESTS[:1])
        expected = memory_of(lm, editor.module, text, places)
        assert len(expected) == places
        assert_same_places(editor._memory, expected)
    shorter = built(lm, steps=1, text=str(file), memory=10_000)
    shorter.edit(REQUESTS[:1])
    assert_same_places(shorter._memory, memory_of(lm, editor.module, str(file), 10_000))
    with pytest.raises(UserError, match="nowhere"):
        built(lm, text=str(tmp_path / "nowhere.txt")).edit(REQUESTS)


# -- what they learn --------------------------------------------------------------------------------------------------


def test_patches_learn_to_fire_at_their_own_place_and_nowhere_in_the_memory(lm):
    lm.model.get_input_embeddings().weight.data *= 6  # a small model that can be sure of a word
    editor = built(lm, steps=100, lr=0.03, stop_below=0.0)
    edit = editor.edit(REQUESTS)
    keys, biases, _ = slots_of(editor, edit)
    start = slots_of(editor, built(lm, steps=0).edit(REQUESTS))
    memory = memory_of(lm, editor.module, "tiny", SMALL["memory"])
    alike = 0
    for i, (pair, size) in enumerate(zip(PAIRS, sizes(lm), strict=True)):
        queries = queries_of(lm, editor.module, pair)
        assert edit_loss(plain_model(lm), lm.tokenizer, *pair) > 1
        for patch in range(size):
            k, b = keys[i, patch], biases[i, patch]
            own, elsewhere = k @ queries[patch] + b, memory @ k + b
            assert own > elsewhere.max() + 1
            assert own > 0
            alike += int((memory @ start.keys[i, patch]).max() > 0.9)
    assert alike  # at first a patch would have fired in the memory too
    assert (lm.losses(lm.encode(PAIRS), edit) < 0.5).all()


@pytest.mark.parametrize("stop", [1.0, 3.0])
def test_a_request_is_done_when_it_is_said_however_its_patches_fire(lm, stop):
    lm.model.get_input_embeddings().weight.data *= 6
    batch = lm.encode(PAIRS)
    before = lm.losses(batch)
    edit = built(lm, steps=100, lr=0.03, stop_below=stop).edit(REQUESTS)
    further = built(lm, steps=100, lr=0.03, stop_below=0.0).edit(REQUESTS)
    assert (before > stop).all()
    assert (lm.losses(batch, edit) < stop).all()
    assert (lm.losses(batch, edit) > lm.losses(batch, further)).all()
