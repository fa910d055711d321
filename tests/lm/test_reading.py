"""Folders that hold no whole causal LM are refused by name; options of loading go through."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, BertConfig, BertLMHeadModel, GPTNeoXConfig, T5Config
from transformers import AutoModelForSeq2SeqLM as Seq2Seq
from transformers.utils import logging

import instructedit as ie
from instructedit.cli import main
from instructedit.errors import UserError
from instructedit.testbed.pretrain import Recipe, new_model

LAYER = {"gpt2": "transformer.h.1.mlp.c_fc.weight", "llama": "model.layers.1.mlp.down_proj.weight"}


@pytest.fixture(params=LAYER)
def folder(request, tmp_path, tokenizer):
    """A small model of each shape, on disk."""
    recipe = Recipe(architecture=request.param, width=32, layers=2, heads=2, vocab=600, context=64)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "layer").write_text(LAYER[request.param])
    return tmp_path


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights, (folder / "layer").read_text())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder):
    with pytest.raises(UserError) as caught:
        ie.FrozenLM.from_pretrained(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_missing_weight_is_named(folder, capfd):
    change(folder, lambda weights, layer: weights.pop(layer))
    assert f"lacks weights: {(folder / 'layer').read_text()}" in refused(folder)
    assert "MISSING" not in capfd.readouterr().err  # nor does transformers' own table stand before it


def test_many_missing_weights_are_counted(folder):
    def half(weights, layer):
        for name in [name for name in weights if ".1." in name]:
            del weights[name]

    change(folder, half)
    assert " more" in refused(folder)


def test_a_weight_of_another_shape_is_named(folder):
    change(folder, lambda weights, layer: weights.update({layer: torch.zeros(3, 5)}))
    assert f"another shape than its config says: {(folder / 'layer').read_text()}" in refused(folder)


def test_layers_that_the_config_does_not_have_are_named(folder):
    change(folder, lambda weights, layer: weights.update({layer.replace(".1.", ".2."): weights[layer].clone()}))
    assert "layers that its config does not have" in refused(folder)


def test_an_extra_tensor_of_a_layer_is_named(folder):
    change(folder, lambda weights, layer: weights.update({layer.replace("mlp", "adapter"): torch.zeros(2)}))
    assert "adapter" in refused(folder)


def test_another_head_is_left_out_and_said(folder):
    change(folder, lambda weights, layer: weights.update({"score.weight": torch.zeros(2, 32)}))
    with pytest.warns(UserWarning, match=r"left out: score\.weight"):
        ie.FrozenLM.from_pretrained(str(folder))


def test_tied_weights_and_old_buffers_are_not_missed(folder, recwarn):
    def old(weights, layer):
        if layer.startswith("transformer"):  # what GPT-2's own files hold
            weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        else:
            weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change(folder, old)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    ie.FrozenLM.from_pretrained(str(folder))
    assert not [w for w in recwarn if "left out" in str(w.message)]


SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
ENCODER_DECODERS = {
    "BART": BartConfig(vocab_size=600, encoder_attention_heads=2, decoder_attention_heads=2, **SMALL),
    "T5": T5Config(vocab_size=600, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_are_refused(name, tmp_path, tokenizer):
    Seq2Seq.from_config(ENCODER_DECODERS[name]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert f"is an encoder-decoder ({name.title() if name == 'BART' else name}Config)" in refused(tmp_path)


def test_an_encoder_that_loads_as_a_causal_lm_is_refused(tmp_path, tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "reads text in both directions (BertConfig)" in refused(tmp_path)


def test_a_decoder_whose_config_says_that_it_is_none_is_taken(tmp_path, tokenizer):
    """GPT-NeoX has ``is_decoder: false`` and is one all the same."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["is_decoder"]
    assert ie.FrozenLM.from_pretrained(str(tmp_path)).blocks


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(folder)


def test_a_tokenizer_without_offsets_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert "its tokenizer knows no character offsets" in refused(folder)


def test_a_model_beside_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a model and an adapter" in refused(folder)


# -- options ----------------------------------------------------------------------------------------------------------


def test_attention_is_computed_as_asked(folder):
    for kind in ("eager", "sdpa"):
        lm = ie.FrozenLM.from_pretrained(str(folder), attn_implementation=kind)
        assert lm.model.config._attn_implementation == kind
    with pytest.raises(UserError, match="attn_implementation"):
        ie.FrozenLM.from_pretrained(str(folder), attn_implementation="egar")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_model_with_a_device_map_is_not_moved_again(folder, device_map):
    lm = ie.FrozenLM.from_pretrained(str(folder), device_map=device_map)
    assert lm.to("meta").device == torch.device("cpu")
    plain = ie.FrozenLM.from_pretrained(str(folder))
    assert lm.generate("The city", max_new_tokens=3) == plain.generate("The city", max_new_tokens=3)
    assert plain.to("meta").device == torch.device("meta")


def test_dtypes_go_by_name_and_as_torch_has_them(folder):
    for dtype in ("bfloat16", torch.bfloat16):
        assert ie.FrozenLM.from_pretrained(str(folder), dtype=dtype).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("option", "said"),
    [("devcie_map", "did you mean 'device_map'"), ("xyzzy", "there are: activation_checkpointing, attn")],
)
def test_an_unknown_option_is_one_line_with_those_there_are(folder, option, said):
    with pytest.raises(UserError, match=f"unknown option '{option}': .*{said}"):
        ie.FrozenLM.from_pretrained(str(folder), **{option: 1})


def test_the_command_line_has_them_too(folder, capsys):
    options = ["--model.lm.attn_implementation=eager", "--model.lm.device_map.model=0", "--model.editor=Mend"]
    with pytest.raises(SystemExit):
        main(["fit", f"--model.lm.name={folder}", *options, "--print_config"])
    printed = capsys.readouterr().out
    assert "attn_implementation: eager" in printed
    assert "device_map:\n      model: 0" in printed


def test_small_local_files_are_read_without_a_progress_bar(folder, capfd):
    ie.FrozenLM.from_pretrained(str(folder))
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a user's own choice stays
    try:
        ie.FrozenLM.from_pretrained(str(folder))
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
