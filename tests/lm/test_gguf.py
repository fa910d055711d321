"""GGUF files through the one name option, against the very model they were written from."""

import gguf
import pytest
import torch
from tests.gguf_files import llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import instructedit as ie
from instructedit.errors import UserError

PACKED = {"plain": None, "8 bits": gguf.GGMLQuantizationType.Q8_0, "4 bits": gguf.GGMLQuantizationType.Q4_1}
TEXT = "The capital of France is"


@pytest.fixture(scope="module", params=PACKED)
def written(request, tokenizer, tmp_path_factory):
    """The model, and the file that was made of it."""
    kind = PACKED[request.param]
    model, file = llama(tokenizer, kind), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, model, tokenizer, kind)
    return model, file


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def test_a_file_is_the_model_it_was_made_of(written, tokenizer):
    model, file = written
    lm = ie.FrozenLM.from_pretrained(str(file))
    ids = lm.tokenizer(TEXT)["input_ids"]
    assert ids == tokenizer(TEXT)["input_ids"]
    torch.testing.assert_close(logits(lm.model, ids), logits(model, ids), atol=1e-5, rtol=1e-5)
    assert lm.max_length == lm.tokenizer.model_max_length == 64
    assert lm.tokenizer.eos_token_id == tokenizer.eos_token_id


def test_a_folder_and_the_name_of_a_file_in_it(written):
    model, file = written
    lm = ie.FrozenLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
    assert lm.model.dtype == torch.bfloat16
    torch.testing.assert_close(lm.model.get_input_embeddings().weight, model.model.embed_tokens.weight.bfloat16())


def test_an_edit_is_merged_into_a_plain_model(written, tmp_path):
    lm = ie.FrozenLM.from_pretrained(str(written[1]))
    edit = ie.build_editor("ft_l", lm, lr=0.1, bound=0.1, steps=2, blocks=[1]).edit([ie.EditRequest(TEXT, " Rome")])
    lm.merge(edit).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    with lm.edited(edit):
        expected = logits(lm.model, ids)
    assert not torch.allclose(expected, logits(lm.model, ids), atol=1e-2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-4, rtol=1e-4)
    again = ie.FrozenLM.from_pretrained(str(tmp_path))  # as any other folder
    torch.testing.assert_close(logits(again.model, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_digits_stand_alone_where_the_file_says_so(pre, tokenizer, tmp_path):
    """SmolLM2's own pre-tokenizer: spaces before a number are one piece, as at the end of a text."""
    write_gguf(tmp_path / "x.gguf", llama(tokenizer), tokenizer, pre=pre)
    found = ie.FrozenLM.from_pretrained(str(tmp_path / "x.gguf")).tokenizer
    split = [piece for piece, _ in found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1984")]
    assert split == (["in", "ĠĠ", "1", "9", "8", "4"] if pre == "smollm" else ["in", "Ġ", "Ġ1984"])


def refused(file, **options):
    with pytest.raises(UserError) as caught:
        ie.FrozenLM.from_pretrained(str(file), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert file.name in message
    return message


def test_an_unknown_architecture_is_named(tokenizer, tmp_path):
    write_gguf(tmp_path / "x.gguf", llama(tokenizer), tokenizer, architecture="plamo")
    assert "architecture plamo" in refused(tmp_path / "x.gguf")


def test_an_encoder_decoder_is_refused(tokenizer, tmp_path):
    write_gguf(tmp_path / "x.gguf", llama(tokenizer), tokenizer, architecture="t5")
    assert "encoder-decoder" in refused(tmp_path / "x.gguf")


def test_a_file_without_words_is_refused(tokenizer, tmp_path):
    write_gguf(tmp_path / "x.gguf", llama(tokenizer), tokenizer, words=False)
    assert "without a tokenizer" in refused(tmp_path / "x.gguf")


def test_one_part_of_several_is_refused(tokenizer, tmp_path):
    write_gguf(tmp_path / "x.gguf", llama(tokenizer), tokenizer, split__count=3)
    assert "one of 3 parts" in refused(tmp_path / "x.gguf")


@pytest.mark.parametrize("keep", [0, 3, 100, -5000])
def test_a_file_that_was_cut_off_is_refused(keep, tokenizer, tmp_path):
    write_gguf(tmp_path / "x.gguf", llama(tokenizer), tokenizer)
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:keep])
    assert "x.gguf" in refused(tmp_path / "x.gguf")


def test_a_missing_tensor_is_named(tokenizer, tmp_path):
    model = llama(tokenizer)
    state = model.state_dict()
    model.state_dict = lambda: {k: v for k, v in state.items() if k != "model.layers.1.mlp.up_proj.weight"}
    write_gguf(tmp_path / "x.gguf", model, tokenizer)
    assert "lacks weights: model.layers.1.mlp.up_proj.weight" in refused(tmp_path / "x.gguf")


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_text("hello")
    assert "not a GGUF file" in refused(tmp_path / "x.gguf")
    assert "quantize='4bit' does not go with" in refused(tmp_path / "x.gguf", quantize="4bit")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nor a local folder or \.gguf file"):
        ie.FrozenLM.from_pretrained(str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match=r"absent\.gguf is missing"):
        ie.FrozenLM.from_pretrained(str(tmp_path), gguf_file="absent.gguf")


def test_an_adapter_names_the_folder_of_the_file(written):
    lm = ie.FrozenLM.from_pretrained(str(written[1]))
    assert lm.source == str(written[1].parent)
