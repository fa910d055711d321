"""Which tokens are labels: the answer's, all of them and no others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from instructedit.errors import UserError
from instructedit.lm import IGNORE, Text, TokenBatch

PAIRS = [
    ("The capital of France is", "Lyon"),
    ("Who", "the man who came from the sea, in 1990!"),
    ("A much longer prompt about a river and a city", "Ωμέγα"),
]


def written(tokenizer, prompt, answer):
    return tokenizer(prompt)["input_ids"], tokenizer(" " + answer)["input_ids"]


def test_each_answer_token_is_the_label_of_the_position_before_it(tokenizer):
    batch = Text(tokenizer, 128).encode(PAIRS)
    for row, pair in enumerate(PAIRS):
        prompt, answer = written(tokenizer, *pair)
        ids = prompt + answer
        padding = batch.input_ids.shape[1] - len(ids)
        assert batch.input_ids[row, : len(ids)].tolist() == ids
        assert batch.attention_mask[row].tolist() == [1] * len(ids) + [0] * padding
        # The last prompt position predicts the first answer token; the last answer token predicts nothing.
        before = [IGNORE] * (len(prompt) - 1)
        assert batch.labels[row].tolist() == before + answer + [IGNORE] * (1 + padding)


def test_answers_come_row_by_row(tokenizer):
    batch = Text(tokenizer, 128).encode(PAIRS)
    answers = [written(tokenizer, *pair)[1] for pair in PAIRS]
    assert batch.answers.tolist() == [token for answer in answers for token in answer]
    assert batch.rows.tolist() == [row for row, answer in enumerate(answers) for _ in answer]


@pytest.mark.parametrize("template", ["[BOS] $A", "$A [EOS]", "[BOS] $A [EOS]"])
def test_special_tokens_are_never_labels(tokenizer, template):
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    backend.add_special_tokens(["[BOS]", "[EOS]"])
    special = [(name, backend.token_to_id(name)) for name in ("[BOS]", "[EOS]")]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=special)
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128)
    batch = Text(adding, 128).encode(PAIRS)
    for row, pair in enumerate(PAIRS):
        prompt, answer = written(tokenizer, *pair)
        labels = batch.labels[row]
        assert labels[labels != IGNORE].tolist() == answer
        first = len(prompt) + template.startswith("[BOS]")
        assert batch.input_ids[row, first : first + len(answer)].tolist() == answer
        assert labels[first - 1] == answer[0]


def test_truncation_takes_the_prompts_beginning(tokenizer):
    short, long = PAIRS[0], ("word " * 60 + "end", "the answer of several tokens")
    with pytest.warns(UserWarning, match="lose their beginning"):
        batch = Text(tokenizer, 20).encode([short, long, short, long])
    prompt, answer = written(tokenizer, *long)
    assert batch.truncated == 2
    assert batch.input_ids.shape == (4, 20)
    assert batch.input_ids[1].tolist() == (prompt + answer)[-20:]
    assert batch.labels[3].tolist() == [IGNORE] * (19 - len(answer)) + answer + [IGNORE]
    assert batch.to("cpu").truncated == 2
    assert TokenBatch.cat([batch, batch]).truncated == 4


def test_a_text_that_just_fits_is_whole(tokenizer):
    prompt, answer = written(tokenizer, *PAIRS[1])
    batch = Text(tokenizer, len(prompt) + len(answer)).encode([PAIRS[1]])
    assert batch.truncated == 0
    assert batch.input_ids[0].tolist() == prompt + answer


@pytest.mark.parametrize("room", [-1, 0])
def test_an_answer_that_leaves_no_prompt_is_refused_by_name(tokenizer, room):
    size = len(written(tokenizer, "x", PAIRS[1][1])[1])
    pairs = [PAIRS[0], PAIRS[1]]
    with pytest.raises(UserError, match=rf"record two.* {size} tokens.*max_length={size + room}"):
        Text(tokenizer, size + room).encode(pairs, ["record one", "record two"])
    with pytest.raises(UserError, match="Who"):
        Text(tokenizer, size + room).encode(pairs)


def test_one_prompt_token_is_enough(tokenizer):
    size = len(written(tokenizer, "x", PAIRS[1][1])[1])
    with pytest.warns(UserWarning, match="lose their beginning"):
        batch = Text(tokenizer, size + 1).encode([("a long prompt", PAIRS[1][1])])
    assert batch.labels[0].tolist() == written(tokenizer, "x", PAIRS[1][1])[1] + [IGNORE]


def test_cat_keeps_every_row(tokenizer):
    parts = [Text(tokenizer, 128).encode(PAIRS[:1]), Text(tokenizer, 128).encode(PAIRS[1:])]
    joined, whole = TokenBatch.cat(parts), Text(tokenizer, 128).encode(PAIRS)
    for name in ("attention_mask", "labels", "answers", "rows"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert torch.equal(joined.input_ids * joined.attention_mask, whole.input_ids * whole.attention_mask)


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_groups_by_length_hold_every_row_once_and_whole(lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 50, mask.shape) * mask
    batch = TokenBatch(ids, mask.long(), torch.where(mask, ids, IGNORE))
    groups = batch.by_length()
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        part = batch.select(group)
        assert part.attention_mask.sum(-1).tolist() == [lengths[row] for row in group]
        for number, row in enumerate(group.tolist()):
            assert part.input_ids[number, : lengths[row]].equal(ids[row, : lengths[row]])
            assert part.labels[number, : lengths[row]].equal(ids[row, : lengths[row]])
    spent = sum(batch.select(group).input_ids.numel() for group in groups)
    assert spent <= ids.numel() if len(groups) == 1 else spent <= 0.8 * ids.numel()


TEXT = st.text(max_size=30).map(str.strip).filter(bool)


@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_labels_spell_the_answer_whatever_the_text(tokenizer, pairs):
    batch = Text(tokenizer, 1000, joiner=" ").encode(pairs)
    for row, (prompt, answer) in enumerate(pairs):
        labels = batch.labels[row]
        assert tokenizer.decode(labels[labels != IGNORE], clean_up_tokenization_spaces=False) == " " + answer
        read = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert tokenizer.decode(read, clean_up_tokenization_spaces=False) == f"{prompt} {answer}"


def test_what_is_asked_of_tokens_waits_for_no_device(tokenizer):
    here = Text(tokenizer, 128).encode(PAIRS)
    there = here.to("meta")  # whose tensors hold nothing: looking into one raises
    for tensor in (*there.inputs.values(), *there.answer_at, there.rows, there.answers):
        assert tensor.device.type == "meta"
    assert (there.lengths, there.answer_sizes()) == (here.lengths, here.answer_sizes())
    assert there.select(torch.tensor([2, 0])).device.type == "meta"
    assert there.in_order([torch.tensor([1]), torch.tensor([0, 2])]).device.type == "meta"
    contexts = [torch.tensor([5, 6])] * 3
    for change in (lambda b: b.prompts(), lambda b: b.after_prompts(), lambda b: b.behind(contexts, 40), lambda b: b):
        changed = change(there)
        assert changed.device.type == "meta"
        assert changed.unpadded() == change(here).unpadded()
    assert TokenBatch.cat([there, there]).answers.device.type == "meta"
    assert [group.tolist() for group in there.by_length()] == [group.tolist() for group in here.by_length()]


def test_padding_at_the_end_is_nothing_to_a_model(lm):
    batch = lm.encode(PAIRS)
    together = lm.scores.states(batch)
    for i in range(len(batch)):
        alone = lm.scores.states(batch.select(torch.tensor([i])))
        torch.testing.assert_close(together[batch.rows == i], alone, atol=1e-5, rtol=1e-5)


@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=6), data=st.data())
@settings(max_examples=50, deadline=None)
def test_answer_positions_of_groups_come_back_in_order(sizes, data):
    labels = torch.full((len(sizes), 4), IGNORE)
    for i, size in enumerate(sizes):
        labels[i, :size] = torch.arange(size) + 10 * i
    batch = TokenBatch(torch.zeros_like(labels), torch.ones_like(labels), labels)
    group = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    groups = [torch.tensor([i for i, g in enumerate(group) if g == side], dtype=torch.long) for side in (False, True)]
    parts = torch.cat([batch.select(rows).answers for rows in groups if len(rows)])
    assert parts[batch.in_order(groups)].tolist() == batch.answers.tolist()
    assert batch.answer_sizes() == sizes
