"""Text that suits a model: which one that is, that it is the model's own, and how it is kept."""

import itertools
import json

import pytest
import torch
from tests.conftest import random_lm
from tests.reference import assert_untouched, footprint
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from instructedit.editors import build_editor
from instructedit.errors import UserError
from instructedit.lm import FrozenLM, own_text
from instructedit.lm.covariance import covariance_file, covariances
from instructedit.lm.own_text import documents_of, text_for
from instructedit.tasks.texts import read_texts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(own_text, "_ROWS", 5)
    monkeypatch.setattr(own_text, "_TOKENS", 12)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def first(lm, folder, count, text="auto"):
    return list(itertools.islice(documents_of(lm, text, folder), count))


def test_a_text_that_is_asked_for_is_taken_and_else_one_that_suits(lm):
    assert text_for(lm) == "sampled"
    assert text_for(FrozenLM(lm.model, lm.tokenizer, "tiny-llama")) == "tiny"
    assert text_for(lm, "tiny") == "tiny"
    assert text_for(lm, "some/file.txt") == "some/file.txt"


def test_the_embedded_corpus_is_read_for_an_embedded_model_alone(lm, tmp_path):
    corpus = list(itertools.islice(read_texts("tiny"), 7))
    embedded = FrozenLM(lm.model, lm.tokenizer, "tiny")
    assert first(embedded, tmp_path, 7) == corpus
    assert not set(first(lm, tmp_path, 7)) & set(corpus)


def test_what_is_sampled_is_likely_to_the_model(tokenizer, tmp_path):
    """Against text that another model says: each finds its own the likelier."""
    one, other = (random_lm("gpt2", tokenizer, seed=seed) for seed in (0, 1))

    def loss(lm, texts):
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
            return sum(lm.model(row, labels=row).loss.item() for row in ids) / len(ids)

    texts = {lm: first(lm, tmp_path, 10) for lm in (one, other)}
    assert loss(one, texts[one]) < loss(one, texts[other]) - 0.1
    assert loss(other, texts[other]) < loss(other, texts[one]) - 0.1


def test_a_model_whose_texts_begin_with_a_token_samples_from_it(tokenizer, tmp_path):
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    beginning = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=128)
    lm = random_lm("gpt2", tokenizer)
    lm.model.resize_token_embeddings(len(beginning))
    used = FrozenLM(lm.model, beginning, "beginning")
    texts = first(used, tmp_path, 10)
    assert len(set(texts)) == 10
    assert all(text.strip() for text in texts)
    ids = torch.tensor([[beginning.bos_token_id]])
    expected = used.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert used.generate("", max_new_tokens=4) == beginning.decode(expected[0, 1:], skip_special_tokens=True)


def test_parts_are_sampled_once_and_differ(lm, tmp_path, monkeypatch):
    before = footprint(lm)
    found = first(lm, tmp_path, 12)
    assert_untouched(lm, before)
    assert len(list(tmp_path.glob("*.json"))) == 3  # of five texts each
    assert len(set(found)) == 12
    assert all(len(lm.tokenizer(text)["input_ids"]) >= 10 for text in found)
    monkeypatch.setattr(own_text.Generation, "sample", lambda *args, **options: 1 / 0)
    assert first(lm, tmp_path, 12) == found
    with pytest.raises(ZeroDivisionError):
        first(lm, tmp_path, 16)
    assert len(list(tmp_path.iterdir())) == 3  # nothing half-made


def test_a_chat_model_samples_the_same_plain_text(tokenizer, tmp_path):
    turns = "{% for m in messages %}{{ m.content }}{% endfor %} It said:"
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    chatting = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, chat_template=turns)
    model = random_lm("gpt2", tokenizer).model
    plain, chat = (FrozenLM(model, chatting, chat=chat) for chat in (False, True))
    assert first(chat, tmp_path / "chat", 3) == first(plain, tmp_path / "plain", 3)
    assert chat.generate("Who") != plain.generate("Who")


def test_a_token_that_is_only_appended_begins_no_text(tokenizer, tmp_path):
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    end = tokenizer.eos_token
    backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, model_max_length=128)
    texts = first(FrozenLM(random_lm("gpt2", tokenizer).model, ending), tmp_path, 5)
    assert [text.startswith(word) for text, word in zip(texts, own_text._OPENINGS, strict=False)] == [True] * 5


def test_another_model_has_another_text(tokenizer, tmp_path):
    texts = [first(random_lm("llama", tokenizer, seed=seed), tmp_path, 3) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("contents", ["", "[1, 2]", '{"a": 1', "3"])
def test_a_corrupt_part_is_named(lm, tmp_path, contents):
    first(lm, tmp_path, 1)
    (file,) = tmp_path.glob("*.json")
    file.write_text(contents)
    with pytest.raises(UserError, match=rf"{file.name}: corrupt .*remove it"):
        first(lm, tmp_path, 1)


def test_moments_are_of_the_models_own_text_unless_told_otherwise(lm, cache, tmp_path, capsys):
    name = lm.select(blocks=[1])[0].name
    found = covariances(lm, [name], tokens=100)[name]
    assert "100 tokens of text that it samples itself" in capsys.readouterr().err
    assert covariance_file(lm, name, "auto", 100) == covariance_file(lm, name, "sampled", 100)
    assert covariance_file(lm, name, "auto", 100) != covariance_file(lm, name, "tiny", 100)
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": text}) + "\n" for text in first(lm, cache / "sampled", 20)))
    torch.testing.assert_close(found, covariances(lm, [name], str(own), tokens=100)[name])
    assert "tokens of " + str(own) in capsys.readouterr().err


@pytest.mark.parametrize("editor", ["rome", "memit", "t_patcher"])
def test_an_editor_says_which_text_it_uses(lm, editor, tmp_path):
    built = build_editor(editor, lm)
    assert built.options()["text"] == "sampled"
    built.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "editor.json").read_text())["options"]["text"] == "sampled"
    assert build_editor(editor, FrozenLM(lm.model, lm.tokenizer, "tiny")).options()["text"] == "tiny"
