"""GRACE: where its codebooks look, what they say, and how several become one, against rules written out by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.conftest import ARCHITECTURES, random_lm
from tests.reference import answer_logits, greedy, plain_model, tokens

from instructedit.editors import build_editor
from instructedit.edits import CodebookEdit
from instructedit.errors import UserError
from instructedit.records import EditRequest

PAIRS = [("The capital of France is", "Lyon"), ("Who", "the man of the sea"), ("A long prompt of a city", "or two")]
REQUESTS = [EditRequest(*pair) for pair in PAIRS]
FAR = ["It was so and so", "The people of the city like cats", "One river"]


def seen_by(lm, name, prompt):
    """What a layer of the plain model sees and gives over a whole prompt, [tokens, in] and [tokens, out]."""
    model, seen = plain_model(lm), []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0][0], out[0])))
    with torch.no_grad():
        model(torch.tensor([lm.tokenizer(prompt)["input_ids"]]))
    hook.remove()
    return seen[0]


def with_codebook(lm, name, entries):
    """A plain model whose layer says v wherever its input is within ε of k, entries (k, v, ε), the nearest first."""
    model = plain_model(lm)

    def look_up(_, args, output):
        said = output.clone()
        for row, position in torch.cartesian_prod(*map(torch.arange, output.shape[:2])).tolist():
            x = args[0][row, position]
            distance, nearest = min((math.dist(x.tolist(), k.tolist()), i) for i, (k, _, _) in enumerate(entries))
            if distance <= entries[nearest][2]:
                said[row, position] = entries[nearest][1]
        return said

    model.get_submodule(name).register_forward_hook(look_up)
    return model


def entries_of(edit):
    assert len(edit) == 1
    return [(k, v, float(r)) for k, v, r in zip(edit.keys[0], edit.values[0], edit.radii[0], strict=True)]


def label_of(ids, width):
    return ids + [-1] * (width - len(ids))


def book_of(keys, radii, labels, values=None, dtype=torch.float64):
    """Books of one entry each; by default their values are their numbers."""
    keys = torch.tensor(keys, dtype=dtype).unsqueeze(1)
    values = torch.arange(len(keys), dtype=dtype)[:, None, None] if values is None else values
    radii = torch.tensor(radii, dtype=dtype).unsqueeze(1)
    return CodebookEdit("site", keys, values, radii, torch.tensor(labels).unsqueeze(1))


def said(edit, x, number=0):
    """What the first of the layer's outputs is where it sees x; −1 is the layer's own."""
    x = torch.as_tensor(x, dtype=torch.float32)[None, None]
    own = torch.full((1, 1, edit.values.shape[-1]), -1.0)
    return edit.change("site", x, own, torch.tensor([number]))[0, 0, 0].item()


# -- what an edit is --------------------------------------------------------------------------------------------------


def test_the_key_is_what_the_layer_sees_at_the_last_token_of_the_prompt(lm):
    editor = build_editor("grace", lm, steps=2, radius=0.7)
    (site,) = editor.sites
    edit = editor.edit(REQUESTS)
    targets = [tokens(lm.tokenizer, *pair)[1] for pair in PAIRS]
    width = max(map(len, targets))
    assert len({len(target) for target in targets}) > 1
    for i, (prompt, _) in enumerate(PAIRS):
        torch.testing.assert_close(edit.keys[i, 0], seen_by(lm, site.name, prompt)[0][-1], atol=1e-5, rtol=1e-5)
        assert edit.labels[i, 0].tolist() == label_of(targets[i], width)
    assert torch.equal(edit.radii, torch.full((3, 1), 0.7))


def test_the_layer_is_the_first_of_the_mlp_as_far_up_as_in_the_paper(lm):
    (site,) = build_editor("grace", lm).sites
    assert site == lm.select(blocks=[2])[0]  # block 35 of 48
    assert not site.output
    names = [site.name for site in lm.select(blocks=[1])]
    (site,) = build_editor("grace", lm, blocks=[1], site_names=names[-1:]).sites
    assert (site.name, site.output) == (names[-1], True)
    with pytest.raises(UserError, match=r"'grace' edits one layer, got .*, "):
        build_editor("grace", lm, blocks=[0, 1], site_names=["*.mlp.*"])


def test_a_cold_start_is_one_draw_and_a_warm_one_what_the_layer_gives(lm):
    cold, again, other, warm = (
        build_editor("grace", lm, steps=0, init=init, seed=seed).edit(REQUESTS)
        for init, seed in (("cold", 0), ("cold", 0), ("cold", 1), ("warm", 0))
    )
    assert 0 <= cold.values.min() < 0.1 < 0.9 < cold.values.max() <= 1
    assert torch.equal(cold.values, cold.values[:1].expand_as(cold.values))
    assert torch.equal(cold.values, again.values)
    assert not torch.equal(cold.values, other.values)
    for i, (prompt, _) in enumerate(PAIRS):
        own = seen_by(lm, cold.site, prompt)[1][-1]
        torch.testing.assert_close(warm.values[i, 0], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["cold", "warm"])
def test_a_value_is_trained_where_the_layer_gives_it(lm, init):
    """Against a loop of its own: the plain model, Adam, and the one position overwritten."""
    options = {"steps": 4, "lr": 0.3, "init": init, "radius": 0.1}
    edit = build_editor("grace", lm, **options).edit(REQUESTS)
    start = build_editor("grace", lm, **{**options, "steps": 0}).edit(REQUESTS)
    for i, (prompt, target) in enumerate(PAIRS):
        model, last = plain_model(lm), len(tokens(lm.tokenizer, prompt, target)[0]) - 1
        value = start.values[i, 0].clone().requires_grad_()

        def give(_, args, output, last=last, value=value):
            return torch.cat([output[:, :last], value[None, None], output[:, last + 1 :]], 1)

        model.get_submodule(edit.site).register_forward_hook(give)
        adam = torch.optim.Adam([value], lr=0.3)
        losses = []
        for _ in range(4):
            adam.zero_grad()
            log_p = answer_logits(model, lm.tokenizer, prompt, target).log_softmax(-1)
            answer = tokens(lm.tokenizer, prompt, target)[1]
            losses.append(-log_p[range(len(answer)), answer].mean())
            losses[-1].backward()
            adam.step()
        assert losses[-1] < losses[0] - 0.01
        torch.testing.assert_close(edit.values[i, 0], value.detach(), atol=2e-3, rtol=1e-3)


# -- a look-up --------------------------------------------------------------------------------------------------------


@st.composite
def books_and_inputs(draw):
    """n books of several entries, some of them none, and inputs of which some are near keys."""
    n, size, inside, outside = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6)), 3
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    keys = torch.randn(n, size, inside, generator=rng) * draw(st.sampled_from([0.5, 3.0, 50.0]))
    radii = torch.rand(n, size, generator=rng) * 2
    radii[torch.rand(n, size, generator=rng) < 0.3] = -1.0
    values = torch.randn(n, size, outside, generator=rng)
    edit = CodebookEdit("site", keys, values, radii, torch.zeros(n, size, 1, dtype=torch.long))
    rows = draw(st.none() | st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    count = len(rows) if rows else n if n > 1 else draw(st.integers(1, 3))
    applied = rows or (list(range(n)) if n > 1 else [0] * count)
    x = torch.randn(count, 4, inside, generator=rng) * 3
    for row, number in enumerate(applied):  # two positions stand within reach of a key, one on it
        x[row, :2] = keys[number, 0] + torch.randn(2, inside, generator=rng) * 0.4
        x[row, 2] = keys[number, -1]
    return edit, x, torch.randn(count, 4, outside, generator=rng), rows, applied


@given(drawn=books_and_inputs())
@settings(max_examples=150, deadline=None)
def test_inside_a_ball_the_output_is_its_value_and_elsewhere_the_layers_own_bit_for_bit(drawn):
    edit, x, y, rows, applied = drawn
    found = edit.change("site", x, y, None if rows is None else torch.tensor(rows))
    for row, number in enumerate(applied):
        entries = [(k.tolist(), j) for j, k in enumerate(edit.keys[number]) if edit.radii[number, j] >= 0]
        for position in range(x.shape[1]):
            expected = y[row, position]
            if entries:
                distance, j = min((math.dist(x[row, position].tolist(), k), j) for k, j in entries)
                radius = edit.radii[number, j].item()
                assume(abs(distance - radius) > 1e-4)  # else rounding decides
                expected = edit.values[number, j] if distance < radius else expected
            assert torch.equal(found[row, position], expected)


def test_the_border_belongs_to_the_ball():
    edit = book_of([[3.0, 4.0]], [5.0], [[1]])
    assert said(edit, [0.0, 0.0]) == 0
    assert said(edit, [-1e-5, 0.0]) == -1


@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_a_prompt_far_from_all_keys_is_the_unedited_model_bit_for_bit(lm, radius):
    edit = build_editor("grace", lm, steps=5, radius=radius).edit(REQUESTS).joined()
    for prompt in (*FAR, PAIRS[0][0]):
        away = torch.cdist(seen_by(lm, edit.site, prompt)[0], edit.keys[0]).min() - radius
        ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
        before = lm.model(ids).logits
        with lm.edited(edit):
            assert torch.equal(lm.model(ids).logits, before) == (prompt in FAR)
        assert (away > 0.01) == (prompt in FAR)


def test_words_one_by_one_are_those_of_teacher_forcing(lm):
    """Whole passes of a plain model with the look-up in a hook of its own, no cache and no padding, against `generate`.

    The radius is so large that words said later are looked up too.
    """
    lm.model.get_input_embeddings().weight.data *= 6  # a small model that can be sure of a word
    edit = build_editor("grace", lm, steps=30, lr=0.5, radius=5.0, blocks=[2]).edit(REQUESTS)
    prompts, hits = [*(prompt for prompt, _ in PAIRS), *FAR], 0
    book = edit.joined()
    for applied, rows in ((edit, [0, 1, 2, 0, 1, 2]), (book, None)):
        with lm.edited(applied, rows):
            found = lm.generate(prompts, max_new_tokens=6)
        for i, prompt in enumerate(prompts):
            model = with_codebook(lm, edit.site, entries_of(applied[rows[i]] if rows else applied))
            ids = greedy(model, lm.tokenizer, prompt, 6)
            assert found[i] == lm.tokenizer.decode(ids)
            hits += ids != greedy(plain_model(lm), lm.tokenizer, prompt, 6)
            if rows and i < 3:  # the same tokens put behind the prompt at once
                whole = torch.tensor([lm.tokenizer(prompt)["input_ids"] + ids])
                with lm.edited(applied[rows[i]]):
                    assert lm.model(whole).logits[0, -7:-1].argmax(-1).tolist() == ids
    assert hits >= 6  # the codebooks are heard


def test_a_target_of_one_token_is_said(lm):
    lm.model.get_input_embeddings().weight.data *= 6
    request = EditRequest("The capital of France is", "in")
    edit = build_editor("grace", lm, radius=0.5).edit([request])
    assert lm.generate(request.prompt, max_new_tokens=1) != " in"
    with lm.edited(edit):
        assert lm.generate(request.prompt, max_new_tokens=1) == " in"
        loss = lm.losses(lm.encode([("The capital of France is", "in")]))
    assert loss < 0.05


# -- several into one -------------------------------------------------------------------------------------------------


#: How far a widened ball reaches, in distances of the key that it was widened for.
REACH = 1.01


def one_after_the_other(keys, radii, labels):
    """Algorithm 1, on lists: [number, radius] of each entry that is kept."""
    book = []
    for new, (key, radius, label) in enumerate(zip(keys, radii, labels, strict=True)):
        if radius < 0:
            continue
        if not book:
            book.append([new, radius])
            continue
        distances = [math.dist(key, keys[number]) for number, _ in book]
        distance = min(distances)
        near = book[distances.index(distance)]
        if distance > near[1] + radius:
            book.append([new, radius])
        elif label == labels[near[0]]:
            near[1] = max(near[1], distance * REACH)
        elif distance <= 1e-5:  # asked again: the newer answer stands
            book.remove(near)
            book.append([new, radius])
        else:
            near[1] = min(near[1], max(0.0, distance / 2 - 1e-5))
            book.append([new, min(radius, distance / 2)])
    return book


@given(data=st.data(), inside=st.integers(1, 3), real=st.booleans(), width=st.integers(1, 2))
@settings(max_examples=300, deadline=None)
def test_a_joined_codebook_is_its_entries_put_in_one_after_the_other(data, inside, real, width):
    number = st.floats(-3, 3) if real else st.integers(-4, 4).map(float)
    size = data.draw(st.integers(1, 7))

    def lists(of):
        return data.draw(st.lists(of, min_size=size, max_size=size))

    keys = lists(st.lists(number, min_size=inside, max_size=inside))
    radii = [data.draw(st.sampled_from([0.5, 1.0, 2.5]))] * size if data.draw(st.booleans()) else lists(
        st.sampled_from([-1.0, 0.25, 1.0, 3.0])
    )  # fmt: skip
    labels = lists(st.lists(st.integers(0, 1), min_size=width, max_size=width))
    expected = one_after_the_other(keys, radii, labels)
    assume(expected)
    # Rounding decides nothing: neither the nearest key nor who is within reach.
    gaps = [math.dist(a, b) for i, a in enumerate(keys) for b in keys[:i]]
    if real:
        assume(all(abs(a - b) > 1e-6 for i, a in enumerate(gaps) for b in gaps[:i]))
        reach = {r for _, r in expected} | set(radii) | {g / 2 for g in gaps} | set(gaps)
        assume(all(abs(g - a - b) > 1e-6 or g == 0 for g in gaps for a in reach for b in set(radii) if a != g))
    joined = book_of(keys, radii, labels).joined()
    kept = [number for number, _ in expected]
    assert len(joined) == 1
    assert joined.values[0, :, 0].tolist() == kept  # so they are in order, each with its own key and label
    assert joined.keys[0].tolist() == [keys[number] for number in kept]
    assert joined.labels[0].tolist() == [labels[number] for number in kept]
    torch.testing.assert_close(joined.radii[0].tolist(), [radius for _, radius in expected], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("second", "label", "kept", "radii"),
    [
        ([2.5], 7, [0, 1], [1.0, 1.0]),  # out of reach, whatever the label
        ([2.5], 8, [0, 1], [1.0, 1.0]),
        ([1.5], 7, [0], [1.5 * REACH]),  # the same label: wider
        ([0.5], 7, [0], [1.0]),  # known already
        ([1.5], 8, [0, 1], [0.75 - 1e-5, 0.75]),  # another label: half the distance each
        ([0.5], 8, [0, 1], [0.25 - 1e-5, 0.25]),
    ],
)
def test_a_new_entry_a_wider_ball_or_two_halves(second, label, kept, radii):
    joined = book_of([[0.0], second], [1.0, 1.0], [[7], [label]]).joined()
    assert joined.values[0, :, 0].tolist() == kept
    torch.testing.assert_close(joined.radii[0].tolist(), radii, atol=1e-12, rtol=0)


@given(seed=st.integers(0, 10_000), inside=st.integers(1, 40), radius=st.floats(0.05, 5.0), part=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_two_balls_that_were_split_do_not_meet_and_each_key_keeps_its_value(seed, inside, radius, part):
    rng = torch.Generator().manual_seed(seed)
    first, step = torch.randn(inside, generator=rng), torch.randn(inside, generator=rng)
    second = first + step / step.norm() * 2 * radius * part
    book = book_of([first.tolist(), second.tolist()], [radius] * 2, [[1], [2]], dtype=torch.float32).joined()
    assert book.keys.shape[1] == 2
    distance = math.dist(*book.keys[0].tolist())
    assert book.radii.min() > 0
    assert book.radii.sum().item() < distance
    torch.testing.assert_close(book.radii.sum().item(), min(distance, 2 * radius), atol=3e-5, rtol=1e-5)
    assert [said(book, key) for key in (first, second)] == [0, 1]
    near = [first + (second - first) * share for share in (0.4, 0.6)]
    assert [said(book, x) for x in near] == [0, 1]


def test_conflicting_requests_keep_their_words_in_one_codebook(lm):
    """Keys are within reach of each other: the radius is larger than the space."""
    batch = lm.encode(PAIRS)
    edit = build_editor("grace", lm, steps=10, radius=100.0).edit(REQUESTS)
    book = edit.joined()
    assert book.keys.shape[1] == 3
    assert book.radii.max() < 10
    alone = torch.cat([answer_logits(with_codebook(lm, edit.site, entries_of(book)), lm.tokenizer, *p) for p in PAIRS])
    torch.testing.assert_close(lm.logits(batch, book), alone.detach(), atol=1e-4, rtol=1e-3)
    change = (lm.logits(batch, book) - lm.logits(batch)).abs().amax(-1)
    assert all(part[0] > 0.01 for part in change.split(batch.rows.bincount().tolist()))


def test_keys_stay_by_their_labels_when_books_of_several_entries_are_joined(lm):
    books = [build_editor("grace", lm, steps=1, radius=0.5).edit(REQUESTS[i:] + REQUESTS[:i]).joined() for i in (0, 1)]
    for start, book in zip((0, 1), books, strict=True):
        order = [(start + i) % 3 for i in range(3)]
        for entry, i in enumerate(order):
            prompt, target = PAIRS[i]
            answer = tokens(lm.tokenizer, prompt, target)[1]
            assert book.labels[0, entry].tolist() == label_of(answer, book.labels.shape[-1])
            key = seen_by(lm, book.site, prompt)[0][-1]
            torch.testing.assert_close(book.keys[0, entry], key, atol=1e-5, rtol=1e-5)
        again = book.joined()
        assert all(torch.equal(t, again.state()[name]) for name, t in book.state().items())


def lost_in_a_wider_ball(inside, count=100):
    """Of pairs of keys of one label, those whose second key its own widened ball does not hold."""
    rng, lost = torch.Generator().manual_seed(0), 0
    for _ in range(count):
        first, step = torch.randn(2, inside, generator=rng)
        second = first + step / step.norm() * (1.1 + 0.8 * torch.rand((), generator=rng))
        book = book_of([first.tolist(), second.tolist()], [1.0, 1.0], [[1], [1]], dtype=torch.float32).joined()
        assert book.keys.shape[1] == 1
        lost += said(book, second) != 0
    return lost


@pytest.mark.parametrize("inside", [32, 1600])
def test_a_wider_ball_holds_the_key_that_it_was_widened_for(inside):
    assert lost_in_a_wider_ball(inside) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_request_that_widened_a_ball_is_answered_in_any_company(tokenizer, architecture, dtype):
    lm, target = random_lm(architecture, tokenizer, dtype), "in"
    names = ("The people", "A man", "Who", "The capital", "One river", "It was so", "A house", "He and she")
    prompts = [f"{name} of the city" for name in names]
    editor = build_editor("grace", lm, steps=1, radius=6.0)
    unheard = []
    for one, other in itertools.combinations(prompts, 2):
        book = editor.edit([EditRequest(one, target), EditRequest(other, target)]).joined()
        if book.keys.shape[1] == 2 or book.radii[0, 0] == 6.0:
            continue  # not widened
        for company in ([other], [other, "A much longer prompt about a river and about a city"]):
            batch = lm.encode([(prompt, target) for prompt in company]).prompts()
            given = lm.record_activations(batch, [book.site], book, cached=False)[book.site].outputs[0]
            if not torch.equal(given[len(lm.tokenizer(other)["input_ids"]) - 1], book.values[0, 0].to(dtype)):
                unheard.append((one, company))
    assert not unheard


def test_a_book_without_an_entry_joins_to_one_without_an_entry():
    empty = book_of([[1.0], [2.0]], [-1.0, -1.0], [[1], [2]])
    joined = empty.joined()
    assert len(joined) == 1
    assert said(joined, [1.0]) == said(joined, [2.0]) == -1
