"""Prompts and answers as token ids, with tokenizers of every make, against what each does with the plain text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import random_lm
from tests.reference import greedy
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import instructedit as ie
from instructedit.errors import UserError
from instructedit.lm import IGNORE, FrozenLM, Text
from instructedit.testbed.corpus import documents

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def trained(model, trainer, pre=None, decoder=None, normalizer=None, template=None, **options):
    """A tokenizer learned from the toy corpus, with digits that stand alone."""
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre, decoder
    if normalizer:
        backend.normalizer = normalizer
    texts = [*(t for t, _ in zip(documents(0, 1), range(1500), strict=False)), "ab 1990 巴黎 ของ é" * 3]
    backend.train_from_iterator(texts, trainer)
    if template:
        names = ("<s>", "</s>")
        backend.post_processor = TemplateProcessing(
            single=template, special_tokens=[(name, backend.token_to_id(name)) for name in names]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **options)


def bytelevel(template=None):
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return trained(
        models.BPE(), trainer, digits, decoders.ByteLevel(), template=template, bos_token="<s>", eos_token="</s>"
    )


def metaspace(template=None):
    """As Unigram models of sentencepiece do: a space piece is put in front of a text's first word."""
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.Metaspace(prepend_scheme="first")])
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    return trained(
        models.Unigram(), trainer, pre, decoders.Metaspace(), template=template, bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def gemma(template=None):
    """As Gemma does: spaces are letters, no word boundary, each digit alone, so that "▁" stands alone before it."""
    pre = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *"0123456789"])
    normalizer = normalizers.Replace(" ", "▁")
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    spaced = pre_tokenizers.Sequence([pre, pre_tokenizers.Split("▁", "merged_with_next")])
    found = trained(
        models.BPE(unk_token="<unk>"), trainer, spaced, decoder, normalizer, template, bos_token="<s>",
        eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    return found


MAKERS = {"bytes": bytelevel, "metaspace": metaspace, "gemma": gemma}
TEMPLATES = [None, "<s> $A", "$A </s>", "<s> $A </s>"]


@pytest.fixture(scope="module")
def tokenizers():
    return {(name, template): make(template) for name, make in MAKERS.items() for template in TEMPLATES}


@pytest.fixture(params=[(name, template) for name in MAKERS for template in TEMPLATES], ids=str)
def one(request, tokenizers):
    return tokenizers[request.param]


def labelled(batch, row=0):
    return batch.labels[row][batch.labels[row] != IGNORE].tolist()


def content(tokenizer, ids):
    return [i for i in ids if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]


PAIRS = [("The capital of France is", "Rome"), ("It was in", "1990"), ("He said (", "no"), ("首都是", "巴黎")]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_prompt_is_the_same_alone_and_with_its_answer(one, pair):
    text = Text(one, 128)
    (alone,) = text.prompts([pair[0]])
    batch = text.encode([pair])
    (row,) = batch.unpadded()
    assert row == alone + labelled(batch)
    assert content(one, alone) == content(one, one(pair[0])["input_ids"])
    assert one.eos_token_id not in row
    assert row.count(one.bos_token_id) == text.opening.count(one.bos_token_id)
    expected = text.joined(*pair)
    if "<unk>" not in one.decode(row):
        assert one.decode(content(one, row), clean_up_tokenization_spaces=False).strip() == expected


def test_a_lone_space_piece_is_learned_and_not_scored(one):
    text = Text(one, 128)
    learned, scored = text.encode([("It was in", "7")]), text.encode([("It was in", "7")], scored=True)
    assert torch.equal(learned.input_ids, scored.input_ids)
    assert len(labelled(learned)) == 2
    assert labelled(scored) == labelled(learned)[1:]
    assert one.decode(labelled(scored)).strip() == "7"
    word = text.encode([("It was in", "France")])
    assert labelled(text.encode([("It was in", "France")], scored=True)) == labelled(word)


@pytest.mark.parametrize("prompt", ["It was in ", " It was in", "It was in\t ", "It was in\u00a0"])
@pytest.mark.parametrize("answer", [" Rome", "Rome \n", "\tRome"])
def test_stray_spaces_are_nothing(one, prompt, answer):
    text = Text(one, 128)
    expected = text.encode([("It was in", "Rome")])
    found = text.encode([(prompt, answer)])
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.labels, expected.labels)
    assert text.prompts([prompt]) == text.prompts(["It was in"])
    request, probe = ie.EditRequest(prompt, answer), ie.Probe("locality", prompt, (answer,))
    assert (request.prompt, request.target) == ("It was in", "Rome") == (probe.prompt, probe.answers[0])


def test_text_inside_is_left_as_it_is(tokenizers):
    request = ie.EditRequest("a  b\n\n c:\n", "d  e\nf")
    assert (request.prompt, request.target) == ("a  b\n\n c:\n", "d  e\nf")
    one = tokenizers["bytes", None]
    (ids,) = Text(one, 128).encode([("a  b\n\n c:\n", "d  e\nf")]).unpadded()
    assert one.decode(ids, clean_up_tokenization_spaces=False) == "a  b\n\n c:\nd  e\nf"


@pytest.mark.parametrize("name", MAKERS)
def test_what_opens_a_row_stays_when_the_prompt_is_cut(tokenizers, name):
    one = tokenizers[name, "<s> $A </s>"]
    pair = ("word " * 60 + "Paris is", "Rome")
    pairs, text = [pair, ("Paris is", "Rome")], Text(one, 20)
    with pytest.warns(UserWarning, match="lose their beginning"):
        batch = text.encode(pairs)
    whole = Text(one, 1000).encode([pair]).unpadded()[0]
    assert batch.truncated == 1
    assert batch.unpadded()[0] == [one.bos_token_id, *whole[-19:]]
    (alone,) = text.prompts([pair[0]])
    with pytest.warns(UserWarning, match="lose their beginning"):
        assert text.shortened([alone], 9) == [[one.bos_token_id, *alone[-8:]]]
    at = text.positions(pairs, [pair[0].rfind("Paris") + 5, 5], batch)
    for row in (0, 1):
        read = one.decode(batch.input_ids[row, : at[row] + 1])
        assert read.endswith("Paris")
    lost = text.positions(pairs, [4, 5], batch)
    assert lost[0] == 1  # what it meant is cut off; the first that is left, not <s>


def test_text_that_opens_with_the_first_token_does_not_have_it_twice(tokenizers):
    for template in ("<s> $A", None):
        one = tokenizers["bytes", template]
        text = Text(one, 128)
        (row,) = text.encode([("<s>It was in", "Rome")]).unpadded()
        assert row[0] == one.bos_token_id
        assert row.count(one.bos_token_id) == 1
        assert text.prompts(["<s>It was in"])[0] == row[: len(text.prompts(["<s>It was in"])[0])]
        assert text.document("<s>It was")[:2].count(one.bos_token_id) == 1


def test_text_goes_on_from_the_prompt_and_not_from_an_appended_token(tokenizer):
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    backend.add_special_tokens(["[EOS]"])
    special = [("[EOS]", backend.token_to_id("[EOS]"))]
    backend.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=special)
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", model_max_length=128)
    lm = random_lm("gpt2", tokenizer)
    lm.model.resize_token_embeddings(len(adding))
    used = FrozenLM(lm.model, adding, "adding")
    expected = tokenizer.decode(greedy(lm.model, tokenizer, "The capital of", 5))
    assert used.generate("The capital of", max_new_tokens=5) == expected
    assert used.generate("The capital of ", max_new_tokens=5) == expected
    with pytest.raises(UserError, match="empty prompt"):
        used.generate("  ")


@pytest.mark.parametrize("joiner", ["", " ", "\n", " -> "])
def test_the_joiner_may_be_said(tokenizers, joiner):
    one = tokenizers["bytes", None]
    text = Text(one, 128, joiner=joiner)
    (row,) = text.encode([("It was in", "Rome")]).unpadded()
    assert one.decode(row, clean_up_tokenization_spaces=False) == f"It was in{joiner}Rome"
    assert row[: len(text.prompts(["It was in"])[0])] == text.prompts(["It was in"])[0]


WORDS = st.text(alphabet='ab 1.("é巴黎是\n', min_size=1, max_size=12).filter(str.strip)


@given(prompt=WORDS, answer=WORDS)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ["bytes", "gemma"])
def test_a_row_is_its_prompt_and_its_answer_whatever_they_are(tokenizers, name, prompt, answer):
    one = tokenizers[name, "<s> $A </s>"]
    text = Text(one, 128)
    batch = text.encode([(prompt, answer)])
    (row,), (alone,) = batch.unpadded(), text.prompts([prompt])
    assert row == alone + labelled(batch)
    if one.unk_token_id not in row:
        assert one.decode(row[1:], clean_up_tokenization_spaces=False) == text.joined(prompt, answer)


# -- chat -------------------------------------------------------------------------------------------------------------


def chatting(tokenizers, template=CHAT, base="bytes", special="<s> $A </s>"):
    source = tokenizers[base, special]
    backend = Tokenizer.from_str(source._tokenizer.to_str())
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("user", "assistant", "end")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=128, chat_template=template
    )


@pytest.mark.parametrize("prompt", ["The capital of France is", "Task: x\nInput: Who?", "assistant", " a "])
def test_a_chat_prompt_is_what_the_template_makes_of_it(tokenizers, prompt):
    one = chatting(tokenizers)
    text = Text(one, 128, chat=True)
    turns = [{"role": "user", "content": prompt.strip()}]
    expected = one.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert text.prompts([prompt]) == [expected]
    assert expected.count(one.bos_token_id) == 1
    batch = text.encode([(prompt, " Rome")])
    assert batch.unpadded()[0] == expected + one("Rome", add_special_tokens=False)["input_ids"]
    assert labelled(batch) == one("Rome", add_special_tokens=False)["input_ids"]
    whole = [*turns, {"role": "assistant", "content": "Rome"}]
    assert one.apply_chat_template(whole, tokenize=False).startswith(one.decode(batch.unpadded()[0]))


def test_a_template_keeps_its_own_space_before_an_answer(tokenizers):
    one = chatting(tokenizers, LLAMA_CHAT)
    batch = Text(one, 128, chat=True).encode([("Who?", "Rome")])
    assert one.decode(batch.unpadded()[0], clean_up_tokenization_spaces=False) == "<s>[INST] Who? [/INST] Rome"
    assert one.decode(labelled(batch)) == " Rome"


def test_a_long_chat_prompt_loses_what_the_user_said_first(tokenizers):
    one = chatting(tokenizers)
    text = Text(one, 20, chat=True)
    with pytest.warns(UserWarning, match="lose their beginning"):
        batch = text.encode([("word " * 60 + "Paris is", "Rome")])
    shown = one.decode(batch.unpadded()[0])
    assert shown.startswith("<s><|user|>\n")
    assert shown.endswith("Paris is<|end|>\n<|assistant|>\nRome")
    at = text.positions([("word " * 60 + "Paris is", "Rome")], [305], batch)
    assert one.decode(batch.input_ids[0, : at[0] + 1]).endswith("Paris")


def test_positions_are_those_of_the_users_words(tokenizers):
    one = chatting(tokenizers)
    pairs = [("The user Paris is", "Rome"), (" user", "Rome")]
    text = Text(one, 128, chat=True)
    batch = text.encode(pairs)
    at = text.positions(pairs, [8, 5], batch)
    for row in (0, 1):
        assert one.decode(batch.input_ids[row, : at[row] + 1]).endswith("The user" if row == 0 else "<|user|>\nuser")


@pytest.mark.filterwarnings("ignore:.*lose their beginning")
@pytest.mark.parametrize("length", [128, 12])
def test_positions_are_the_same_with_an_end_behind_the_answer(tokenizers, length):
    pairs = [("word word word word word word word Paris is", "Rome")]
    text = Text(tokenizers["bytes", TEMPLATES[3]], length)
    for one in (text, text.ended()):
        batch = one.encode(pairs)
        at = one.positions(pairs, [len("word " * 7 + "Paris")], batch)
        assert one.tokenizer.decode(batch.input_ids[0, : at[0] + 1]).endswith("word Paris")


def test_contexts_stand_within_the_users_turn(tokenizers):
    one = chatting(tokenizers)
    text = Text(one, 128, chat=True)
    batch = text.encode([("Who?", "Rome")])
    behind = batch.behind([torch.tensor(text.token_ids("New fact: a b\n"))], 128, text.opening)
    assert one.decode(behind.unpadded()[0]) == "<s><|user|>\nNew fact: a b\nWho?<|end|>\n<|assistant|>\nRome"
    assert labelled(behind) == labelled(batch)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('none of\nthis') }}", "fails: TemplateError: none of this"),
        ("{% if", "chat template of .* fails"),
        ("nothing said", "does not show what the user says"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_in_one_line(tokenizers, template, message):
    one = chatting(tokenizers, template)
    with pytest.raises(UserError, match=message) as error:
        Text(one, 128, chat=True)
    assert "\n" not in str(error.value)


def test_a_chat_model_is_edited_scored_and_asked_in_its_template(tokenizers):
    one = chatting(tokenizers)
    lm = random_lm("llama", tokenizers["bytes", None])
    lm.model.resize_token_embeddings(len(one))
    chat = FrozenLM(lm.model, one, "chat", chat=True)
    turn = one.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True, tokenize=False)
    plain = [int(i) for i in one(turn, add_special_tokens=False)["input_ids"]]
    said = []
    for _ in range(4):
        said.append(int(lm.model(torch.tensor([plain + said])).logits[0, -1].argmax()))
    assert chat.generate("Who? ", max_new_tokens=4) == one.decode(said, skip_special_tokens=True)
    editor = ie.build_editor("ft_l", chat, blocks=[-1], lr=0.05, bound=1.0, steps=30)
    request = ie.EditRequest("Who?", "Rome")
    batch = editor.requests([request], None)
    assert one.decode(batch.tokens.unpadded()[0]) == f"{turn}Rome"
    with chat.edited(editor.edit([request])):
        assert chat.generate("Who?", max_new_tokens=len(labelled(batch.tokens))).startswith("Rome")
