"""IKE's demonstrations against TF-IDF by hand, and the text that the model reads."""

import json
import math
import re
import sys
import types
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import random_lm
from tests.lm.contexts import row_logits, with_bos

from instructedit.editors import build_editor
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.records import EditRequest

#: (prompt, target, rephrasing, locality), some without one of the last two.
FACTS = [
    ("The capital of France is", "Lyon", "France's capital is", "The sea of France is"),
    ("The old capital of Spain is", "Oslo", "Spain had the capital", None),
    ("The mayor of Paris is", "a cat", None, "The river of Paris is"),
    ("The king of Norway likes", "cheese", "Norway's king likes", "Sweden's king likes"),
    ("Who wrote the book about the sea?", "Anna", "The book about the sea is by", "Who wrote the book about war?"),
    ("The capital of Norway is", "Rome", "Norway has the capital", "The sea of Norway is"),
]
REPLIES = {"ent": "cheese", "pos": ["I love it.", "The best of Norway!"], "neg": ["I hate it."]}
REQUEST = EditRequest("The capital of Norway is", "Paris")


def record(prompt, target, rephrasing, locality, answer="something"):
    found = {"prompt": prompt, "target_new": target, "portability": {}, "locality": {}}
    found |= {"rephrase": rephrasing} if rephrasing else {}
    return found | ({"locality": {"Near": [{"prompt": locality, "ground_truth": answer}]}} if locality else {})


def written(folder, facts=FACTS):
    path = folder / "facts.json"
    path.write_text(json.dumps([record(*fact) for fact in facts]))
    return {"counterfact": str(path)}


@pytest.fixture
def sources(tmp_path):
    return written(tmp_path)


@pytest.fixture(scope="module")
def one_lm(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    lm.max_length = 2000  # of the texts alone; nothing is run
    return lm


def said(lm, edit, i=0):
    return lm.tokenizer.decode(edit.ids[i, 0, : edit.lengths[i, 0]])


def shown(lm, edit, i=0):
    """The demonstrations of a context as (line of the fact, line of the question), and its last line."""
    lines = said(lm, edit, i).split("\n")
    assert lines[-1] == ""
    return list(zip(lines[:-2:2], lines[1:-2:2], strict=True)), lines[-2]


# -- by hand ----------------------------------------------------------------------------------------------------------


def vectors(texts):
    """TF-IDF with smoothed idf = ln((1 + n)/(1 + df)) + 1, of length one; what makes such a vector of a text."""
    split = lambda text: re.findall(r"\w+", text.lower())  # noqa: E731
    seen = Counter(word for text in texts for word in set(split(text)))
    idf = {word: math.log((1 + len(texts)) / (1 + count)) + 1 for word, count in seen.items()}

    def vector(text):
        counts = {word: n * idf[word] for word, n in Counter(split(text)).items() if word in idf}
        size = math.sqrt(sum(value**2 for value in counts.values()))
        return {word: value / size for word, value in counts.items()}

    return vector


def similarities(texts, query):
    vector = vectors(texts)
    asked = vector(query)
    return [sum(value * asked.get(word, 0.0) for word, value in vector(text).items()) for text in texts]


def ranked(facts, sort, request=REQUEST):
    """The demonstrations of a sort, the nearest first, as pairs of lines."""
    question = {
        "copy": lambda f: (f[0], f[1]),
        "update": lambda f: (f[2], f[1]),
        "retain": lambda f: (f[3], "something"),
    }
    having = [fact for fact in facts if question[sort](fact)[0]]
    scores = similarities([f"{fact[0]} {fact[1]}" for fact in having], f"{request.prompt} {request.target}")
    order = sorted(range(len(having)), key=lambda i: -scores[i])
    lines = [(f"New fact: {f[0]} {f[1]}", " ".join(question[sort](f))) for f in having]
    return [lines[i] for i in order], [scores[i] for i in order]


SORTS = {"copy": 0, "update": 1, "retain": 2}


@pytest.mark.parametrize("sort", SORTS)
def test_of_one_sort_the_nearest_are_shown_and_the_nearest_last(one_lm, sources, sort):
    ratio = [int(number == SORTS[sort]) for number in range(3)]
    lines, scores = ranked(FACTS, sort)
    assert len(set(scores)) == len(scores)
    for count in range(len(FACTS) + 2):
        editor = build_editor("ike", one_lm, sources=sources, demonstrations=count, ratio=ratio)
        found, fact = shown(one_lm, editor.edit([REQUEST]))
        assert found == lines[:count][::-1]
        assert fact == "New fact: The capital of Norway is Paris"


@pytest.mark.parametrize(("demonstrations", "ratio"), [(8, (1, 3, 4)), (4, (2, 1, 1)), (9, (1, 1, 1)), (6, (0, 1, 2))])
def test_copies_updates_and_retained_stand_in_proportion(one_lm, sources, demonstrations, ratio):
    editor = build_editor("ike", one_lm, sources=sources, demonstrations=demonstrations, ratio=ratio)
    found, _ = shown(one_lm, editor.edit([REQUEST]))
    expected = {}
    for sort, part in zip(SORTS, ratio, strict=True):
        lines = ranked(FACTS, sort)[0][: demonstrations * part // sum(ratio)]
        expected[sort] = lines
        assert [pair for pair in found if pair in lines] == lines[::-1]  # nearest last within each sort
    assert sorted(found) == sorted(sum(expected.values(), []))  # noqa: RUF017


@pytest.mark.parametrize("demonstrations", range(9))
def test_as_many_are_shown_as_asked_for(one_lm, sources, demonstrations):
    editor = build_editor("ike", one_lm, sources=sources, demonstrations=demonstrations, room=1.0)
    assert len(editor._nearest(REQUEST)) == demonstrations


def test_ties_are_shown_in_the_order_of_the_data(one_lm, tmp_path):
    facts = [("A city is", name, "Again", "Elsewhere") for name in ("one", "two", "three")]
    editor = build_editor("ike", one_lm, sources=written(tmp_path, facts), demonstrations=3, ratio=(1, 0, 0))
    found, _ = shown(one_lm, editor.edit([EditRequest("A city is", "new")]))
    assert [fact for fact, _ in found] == [f"New fact: A city is {name}" for name in ("three", "two", "one")]


WORDS = st.lists(st.sampled_from(["the", "a", "sea", "king", "old", "X9", "Ωμέγα"]), min_size=1, max_size=6).map(
    " ".join
)


@given(
    facts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6, unique=True), asked=WORDS, count=st.integers(1, 6)
)
@settings(max_examples=40, deadline=None)
def test_no_demonstration_that_is_left_out_is_nearer(one_lm, tmp_path_factory, facts, asked, count):
    sources = written(tmp_path_factory.mktemp("ike"), [(*fact, "Again", "Elsewhere") for fact in facts])
    editor = build_editor("ike", one_lm, sources=sources, demonstrations=count, ratio=(1, 0, 0), room=1.0)
    found, _ = shown(one_lm, editor.edit([EditRequest(asked, "new")]))
    texts = [" ".join(fact) for fact in facts]
    scores = dict(zip(texts, similarities(texts, f"{asked} new"), strict=True))
    chosen = [scores[fact.removeprefix("New fact: ")] for fact, _ in found]
    assert chosen[::-1] == pytest.approx(sorted(scores.values(), reverse=True)[:count], abs=1e-9)


def test_demonstrations_come_from_all_sources(one_lm, sources, tmp_path):
    (tmp_path / "replies.json").write_text(json.dumps([REPLIES, REPLIES | {"ent": "tea"}]))
    sources["convsent"] = str(tmp_path / "replies.json")
    editor = build_editor("ike", one_lm, sources=sources, demonstrations=60, ratio=(1, 1, 1), room=1.0)
    found, _ = shown(one_lm, editor.edit([REQUEST]))
    facts = {fact for fact, _ in found}
    assert {f"New fact: {fact[0]} {fact[1]}" for fact in FACTS} <= facts
    asked = "What do you think of"
    assert any(fact.startswith(f"New fact: {asked} cheese?") for fact in facts)
    assert any(line.startswith(f"{asked} tea?") for fact, line in found if f"{asked} cheese?" in fact)  # retained
    assert any(fact != f"New fact: {line}" for fact, line in found if f"{asked} cheese?" in fact and "cheese?" in line)


# -- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0.0, 0.03, 0.1, 0.2, 0.6, 1.0])
def test_the_farthest_give_way_where_the_context_has_no_room(one_lm, sources, room):
    options = {"sources": sources, "demonstrations": 16, "ratio": (1, 1, 2)}
    lm = FrozenLM(one_lm.model, one_lm.tokenizer, max_length=200)
    lm.max_length = 200
    whole, _ = shown(one_lm, build_editor("ike", one_lm, **options).edit([REQUEST]))
    edit = build_editor("ike", lm, **options, room=room).edit([REQUEST])
    found, fact = shown(lm, edit)
    assert fact == "New fact: The capital of Norway is Paris"  # whatever the room
    assert found == whole[len(whole) - len(found) :]
    budget = int(200 * room)
    length, alone = edit.lengths[0, 0].item(), len(lm.tokenizer(fact + "\n")["input_ids"])
    assert length <= max(budget, alone)
    if len(found) < len(whole):
        following = "".join(f"{line}\n" for line in whole[-len(found) - 1])
        assert length + len(lm.tokenizer(following)["input_ids"]) > budget
    assert bool(found) == (room > 0.2)
    if room < 1:
        assert len(found) < len(whole)


def test_what_gives_way_leaves_the_proportion_as_it_is(one_lm, sources):
    parts = {"copy": 1, "update": 1, "retain": 2}
    sort_of = {pair: sort for sort in SORTS for pair in ranked(FACTS, sort)[0]}
    lm = FrozenLM(one_lm.model, one_lm.tokenizer)
    for length in range(60, 400, 20):
        lm.max_length = length
        editor = build_editor("ike", lm, sources=sources, demonstrations=16, ratio=(1, 1, 2), room=1.0)
        found, _ = shown(lm, editor.edit([REQUEST]))
        counts = Counter(sort_of[pair] for pair in found)
        for sort, part in parts.items():
            assert abs(counts[sort] - len(found) * part / 4) < 1.5


# -- what the model reads ---------------------------------------------------------------------------------------------


def test_the_model_reads_demonstrations_then_the_fact_then_the_prompt(lm, sources):
    requests = [REQUEST, EditRequest("Who wrote the book about war?", "Leo")]
    edit = build_editor("ike", lm, sources=sources, demonstrations=2, ratio=(1, 0, 1), room=1.0).edit(requests)
    assert len(edit) == 2
    assert edit.sites == ()
    asked = [("Norway's capital is", "Paris"), ("It was", "so")]
    expected = [row_logits(lm, pair, said(lm, edit, i)) for i, pair in enumerate(asked)]
    torch.testing.assert_close(lm.logits(lm.encode(asked), edit), torch.cat(expected), atol=3e-5, rtol=1e-4)
    for i, request in enumerate(requests):
        assert said(lm, edit, i).endswith(f"\nNew fact: {request.prompt} {request.target}\n")


def test_the_context_holds_no_special_tokens(tokenizer, sources):
    """LLaMA's <s> stands once, at the start of the row."""
    used = with_bos(tokenizer, "[BOS] $A")
    model = random_lm("llama", tokenizer).model
    model.resize_token_embeddings(len(used), mean_resizing=False)
    lm = FrozenLM(model, used)
    edit = build_editor("ike", lm, sources=sources, demonstrations=2, ratio=(1, 0, 1), room=1.0).edit([REQUEST])
    assert used.bos_token_id not in edit.ids[0, 0, : edit.lengths[0, 0]].tolist()


# -- other retrievers, and what is refused ----------------------------------------------------------------------------


def test_sentence_transformers_must_be_installed(one_lm, sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    editor = build_editor("ike", one_lm, sources=sources, retriever="sentence-transformers")
    with pytest.raises(UserError, match="'sentence-transformers' needs that package: pip install"):
        editor.edit([REQUEST])


def test_a_sentence_model_ranks_by_its_own_vectors(one_lm, sources, monkeypatch):
    asked = []

    class Model:
        def __init__(self, name):
            asked.append(name)

        def encode(self, texts, normalize_embeddings=False):
            assert normalize_embeddings
            angles = torch.tensor([len(text) / 100 for text in texts])  # near is what is of one length
            return torch.stack([angles.cos(), angles.sin()], 1).numpy()

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Model))
    options = {"demonstrations": 6, "ratio": (1, 0, 0), "retriever": "sentence-transformers"}
    editor = build_editor("ike", one_lm, sources=sources, sentence_model="some/model", **options)
    found, _ = shown(one_lm, editor.edit([REQUEST]))
    own = len(f"{REQUEST.prompt} {REQUEST.target}")
    texts = sorted((f"{f[0]} {f[1]}" for f in FACTS), key=lambda text: abs(len(text) - own))
    assert [fact.removeprefix("New fact: ") for fact, _ in found] == texts[::-1]
    assert set(asked) == {"some/model"}


@pytest.mark.parametrize("ratio", [(1, 3), (1, 2, 3, 4), (1, -1, 2), (0, 0, 0), ()])
def test_a_wrong_ratio_is_refused(lm, ratio):
    with pytest.raises(UserError, match=r"editor 'ike': ratio must be three weights \(copy, update, retain\), got \["):
        build_editor("ike", lm, ratio=ratio)


def test_a_source_that_is_not_there_is_told(lm, tmp_path):
    editor = build_editor("ike", lm, sources={"counterfact": str(tmp_path / "nowhere.json")})
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        editor.edit([REQUEST])


def test_data_without_one_sort_show_the_others(one_lm, tmp_path):
    facts = [(*fact[:3], None) for fact in FACTS]
    editor = build_editor("ike", one_lm, sources=written(tmp_path, facts), demonstrations=8)
    found, _ = shown(one_lm, editor.edit([REQUEST]))
    assert len(found) == 1 + 3
