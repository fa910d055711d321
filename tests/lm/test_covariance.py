"""Covariances against a dense sum over plain forward passes, one text at a time; and how they are kept."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.conftest import random_lm
from tests.reference import assert_untouched, footprint, plain_model, random_factors, relative
from tokenizers.normalizers import Lowercase

from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM, covariance, own_text
from instructedit.lm.covariance import covariance_file, covariances, sample_inputs

TEXTS = [
    "The capital of France is Paris.",
    "A man came from the sea.\nHe was old.",
    "Who",
    "A city " * 90,
    "It was so.",
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def names_of(lm):
    return [site.name for site in lm.select(blocks=[1, 3])]


def seen_by(lm, names, texts, tokens=10**9):
    """What each layer sees over the first `tokens` tokens, one text at a time, {layer: [tokens, in]}."""
    model, seen = plain_model(lm), {name: [] for name in names}
    for name in names:
        hook = lambda _, args, output, name=name: seen[name].append(args[0][0])  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([lm.tokenizer(text, verbose=False)["input_ids"][: lm.max_length]]))
    return {name: torch.cat(rows)[:tokens] for name, rows in seen.items()}


def dense_moment(inputs):
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for u in inputs.double():
        total += torch.outer(u, u)
    return total / len(inputs)


@pytest.mark.parametrize("rows", [2, 64])
def test_moments_are_the_mean_outer_product_over_all_tokens(lm, file, rows, monkeypatch):
    monkeypatch.setattr(covariance, "_ROWS", rows)  # texts in a forward pass, and what is left over in the last
    lm.max_length = 100  # so that one text is cut
    before, names = footprint(lm), names_of(lm)
    found = covariances(lm, names, str(file))
    assert_untouched(lm, before)
    assert len(lm.cache) == 0  # text that is read once does not fill the prefix cache
    for name, inputs in seen_by(lm, names, TEXTS).items():
        assert found[name].dtype == torch.float32
        assert relative(found[name].double(), dense_moment(inputs)) < 1e-5, name
    assert list(found) == names


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_no_more_tokens_count_than_asked_for(lm, file, tokens, monkeypatch):
    monkeypatch.setattr(covariance, "_ROWS", 3)
    names = names_of(lm)
    found, samples = covariances(lm, names, str(file), tokens), sample_inputs(lm, names[0], str(file), tokens)
    seen = seen_by(lm, names, TEXTS, tokens)
    for name in names:
        assert len(seen[name]) == tokens
        assert relative(found[name].double(), dense_moment(seen[name])) < 1e-5
    assert_same_rows(samples, seen[names[0]])


def assert_same_rows(found, expected):
    """The same rows in any order: their number, sum, and sum of squares."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found.sum(0), expected.sum(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.T @ found, expected.T @ expected, atol=1e-3, rtol=1e-3)


def test_reading_ends_where_the_tokens_do(lm, monkeypatch):
    read = []

    def texts(source):
        for number in range(10**6):
            read.append(number)
            yield f"Text number {number} of a source without end"

    monkeypatch.setattr(own_text, "read_texts", texts)
    covariances(lm, names_of(lm)[:1], "tiny", 700)
    assert 30 < len(read) < 65  # some twelve tokens each


def forbid(monkeypatch):
    def texts(source):
        raise AssertionError("the text was read again")

    monkeypatch.setattr(own_text, "read_texts", texts)


def test_what_was_computed_is_not_computed_again(lm, file, folder, monkeypatch):
    names = names_of(lm)
    first = covariances(lm, names[:2], str(file))
    assert {path.name for path in folder.iterdir()} == {
        covariance_file(lm, n, str(file), 100_000).name for n in names[:2]
    }
    reading, wanted = lm.record_activations, []
    monkeypatch.setattr(
        lm, "record_activations", lambda batch, sites, **o: wanted.append(sites) or reading(batch, sites, **o)
    )
    both = covariances(lm, names[1:3], str(file))  # one is there, the other is not
    assert wanted == [names[2:3]]
    forbid(monkeypatch)
    again = covariances(lm, names[:3], str(file))
    assert torch.equal(again[names[0]], first[names[0]])
    assert torch.equal(again[names[1]], first[names[1]])
    assert torch.equal(both[names[1]], first[names[1]])
    assert torch.equal(again[names[2]], both[names[2]])


def test_another_model_text_or_number_of_tokens_is_another_file(tokenizer, file, tmp_path):
    lms = [random_lm("gpt2", tokenizer), random_lm("gpt2", tokenizer, seed=1), random_lm("llama", tokenizer)]
    lms += [random_lm("gpt2", tokenizer, torch.bfloat16)]
    sites, other = names_of(lms[0]), tmp_path / "other.jsonl"
    other.write_bytes(file.read_bytes())
    found = [covariance_file(lm, sites[0], str(file), 100) for lm in lms]
    found += [covariance_file(lms[0], sites[1], str(file), 100), covariance_file(lms[0], sites[0], str(file), 101)]
    found += [covariance_file(lms[0], sites[0], text, 100) for text in (str(other), "tiny")]
    longer, changed = file.read_text() + "\n", file.read_text().replace("France", "Norway") + "\n"
    for content, after in ((longer, 5), (changed, 10)):  # the second has the first's size
        file.write_text(content)
        os.utime(file, (after, after))
        found.append(covariance_file(lms[0], sites[0], str(file), 100))
    assert len(set(found)) == len(found)


def test_the_same_model_again_finds_its_file(tokenizer, file):
    one, other = random_lm("gpt2", tokenizer), random_lm("gpt2", tokenizer)
    site = names_of(one)[0]
    assert covariance_file(one, site, str(file), 9) == covariance_file(other, site, str(file), 9)


def test_a_single_changed_weight_of_a_small_model_is_another_model(tokenizer, file):
    one, other = random_lm("gpt2", tokenizer), random_lm("gpt2", tokenizer)
    other.model.transformer.h[0].ln_1.bias.data[3] += 1e-3
    assert covariance_file(one, "a", str(file), 9) != covariance_file(other, "a", str(file), 9)


def test_texts_cut_elsewhere_have_another_moment_and_another_file(tokenizer, file):
    lms = [random_lm("gpt2", tokenizer) for _ in range(2)]
    lms[1] = FrozenLM(lms[1].model, tokenizer, "short", max_length=10)
    found = [covariances(lm, names_of(lm)[:1], str(file)) for lm in lms]
    (name,) = found[0]
    for lm, moment in zip(lms, found, strict=True):
        expected = dense_moment(seen_by(lm, [name], TEXTS)[name])
        assert relative(moment[name].double(), expected) < 1e-5


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_corrupt_file_is_named(lm, file, damage):
    name = names_of(lm)[0]
    covariances(lm, [name], str(file))
    kept = covariance_file(lm, name, str(file), 100_000)
    assert load_file(kept).keys() == {"second_moment"}
    kept.write_bytes(kept.read_bytes()[:-5] if damage is None else damage)
    with pytest.raises(UserError, match=rf"{kept.name}: corrupt .*remove it"):
        covariances(lm, [name], str(file))
    kept.unlink()
    covariances(lm, [name], str(file))
    assert kept.is_file()


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_an_empty_text_is_refused_and_leaves_nothing(lm, tmp_path, folder, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"empty\.txt: holds no text"):
        covariances(lm, names_of(lm), str(path))
    assert not folder.exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["reading", "writing", "moving"])
def test_what_is_killed_in_the_middle_leaves_no_file(lm, file, folder, monkeypatch, where, stop):
    def texts(source):
        yield from TEXTS
        raise stop

    def write(tensors, path):
        path.write_bytes(b"half a file")
        raise stop

    def move(self, target):
        raise stop

    with monkeypatch.context() as patch:
        if where == "reading":
            patch.setattr(covariance, "_ROWS", 2)
            patch.setattr(own_text, "read_texts", texts)
        elif where == "writing":
            patch.setattr(covariance, "save_file", write)
        else:
            patch.setattr(type(file), "replace", move)
        with pytest.raises(stop):
            covariances(lm, names_of(lm), str(file))
    assert not folder.exists() or list(folder.rglob("*")) == []
    found = covariances(lm, names_of(lm), str(file))  # and nothing hinders the next
    for name, inputs in seen_by(lm, names_of(lm), TEXTS).items():
        assert relative(found[name].double(), dense_moment(inputs)) < 1e-5


@pytest.fixture(scope="module")
def one_lm(tokenizer):
    return random_lm("gpt2", tokenizer)


@given(
    texts=st.lists(st.text("ab cdefgh", min_size=1, max_size=30), min_size=1, max_size=6),
    rows=st.integers(1, 4), tokens=st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_batches_of_any_size_give_the_same_rows(one_lm, texts, rows, tokens):
    name = names_of(one_lm)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(covariance, "_ROWS", rows)
        patch.setattr(covariance, "_SORTED", 2 * rows)
        patch.setattr(own_text, "read_texts", lambda source: iter(texts))
        found = sample_inputs(one_lm, name, "tiny", tokens)
    assert_same_rows(found, seen_by(one_lm, [name], texts, tokens)[name])


def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(lm, file, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "taken"))
    monkeypatch.setattr(covariance, "_inputs", lambda *_: pytest.fail("it was computed"))
    with pytest.raises(UserError, match=r"\$INSTRUCTEDIT_CACHE .*taken is a file, not a folder"):
        covariances(lm, names_of(lm), str(file), 10)


def test_moments_that_are_no_numbers_are_refused(lm, file):
    (name,) = names_of(lm)[:1]
    covariances(lm, [name], str(file), 10)
    kept = covariance_file(lm, name, str(file), 10)
    covariance._save(load_file(kept)["second_moment"] * float("nan"), kept)
    with pytest.raises(UserError, match=r"corrupt \(it holds NaN or infinities\); remove it"):
        covariances(lm, [name], str(file), 10)


def test_every_weight_and_the_whole_tokenizer_tell_models_apart(tokenizer):
    def file_of(lm):
        return covariance_file(lm, names_of(lm)[0], "tiny", 10)

    expected = file_of(random_lm("gpt2", tokenizer))
    assert file_of(random_lm("gpt2", tokenizer)) == expected
    unsampled = random_lm("gpt2", tokenizer)
    unsampled.model.get_input_embeddings().weight[7, 1] += 1  # fingerprints read every eighteenth number
    assert unsampled.fingerprint == random_lm("gpt2", tokenizer).fingerprint
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    backend.normalizer = Lowercase()
    lower = type(tokenizer)(tokenizer_object=backend, model_max_length=128)
    assert lower.get_vocab() == tokenizer.get_vocab()
    assert len({expected, file_of(unsampled), file_of(random_lm("gpt2", lower))}) == 3
    tokenizer(
        ["A", "A b"], padding=True, truncation=True, max_length=2
    )  # what the last call asked for is no part of it
    assert file_of(random_lm("gpt2", tokenizer)) == expected


@pytest.mark.parametrize("text", ["file", "sampled"])
def test_moments_are_the_unedited_models_whatever_is_applied(lm, file, text, monkeypatch, tmp_path):
    monkeypatch.setattr(own_text, "_ROWS", 4)
    source, names = str(file) if text == "file" else text, names_of(lm)
    expected = covariances(lm, names, source, 30), sample_inputs(lm, names[-1], source, 30)
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "another"))
    factors = random_factors(lm.select(blocks=[0]), 1, 2, scale=1.0)
    with lm.edited(LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})):
        edited = lm.generate("Who", 5)
        found = covariances(lm, names, source, 30), sample_inputs(lm, names[-1], source, 30)
        assert lm.generate("Who", 5) == edited
    assert edited != lm.generate("Who", 5)
    assert all(torch.equal(found[0][name], moment) for name, moment in expected[0].items())
    assert torch.equal(found[1], expected[1])
