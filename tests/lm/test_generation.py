"""What models say, against plain transformers' words: every way of knowing positions, windows, running states."""

import pytest
import torch
import transformers as hf
from tests.conftest import random_lm
from tests.reference import dense, dense_copy, greedy, plain_model, random_factors

from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM, decoding
from instructedit.lm.decoding import Layout

PROMPTS = [
    "The capital of France is",
    "A",
    "In the year 1969" + " the first people" * 4,
    "Who",
    "A river and a city in it",
]
COMMON = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 599,
}  # fmt: skip
GPT = {"vocab_size": 600, "n_embd": 32, "n_layer": 3, "n_head": 4}
SMALL = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 3}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MODELS = {
    "gpt2": hf.GPT2Config(**GPT),
    "llama": hf.LlamaConfig(**COMMON, num_key_value_heads=2),
    "opt": hf.OPTConfig(**COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": hf.MptConfig(vocab_size=600, d_model=32, n_layers=3, n_heads=4, max_seq_len=128),
    "bloom": hf.BloomConfig(vocab_size=600, hidden_size=32, n_layer=3, n_head=4),
    "falcon-alibi": hf.FalconConfig(**SMALL, num_attention_heads=4, alibi=True),
    "falcon-rotary": hf.FalconConfig(**SMALL, num_attention_heads=4, alibi=False),
    "gpt_neo": hf.GPTNeoConfig(
        vocab_size=600, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=8, max_position_embeddings=128,
    ),
    "gpt_neox": hf.GPTNeoXConfig(**COMMON),
    "mistral": hf.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=8),
    "mistral-wide": hf.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=40),  # wider than what is tried
    "gemma3": hf.Gemma3TextConfig(**COMMON, num_key_value_heads=2, head_dim=8, sliding_window=8),
    "mamba": hf.MambaConfig(**SMALL, state_size=8),
    "jamba": hf.JambaConfig(
        **COMMON, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "rwkv": hf.RwkvConfig(**SMALL, attention_hidden_size=32),
    "lfm2": hf.Lfm2Config(**COMMON, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
    "deepseek_v2": hf.DeepseekV2Config(**COMMON | LATENT),
}  # fmt: skip


def model_of(config, tokenizer):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    model.generation_config.eos_token_id = None  # some have one by default
    return FrozenLM(model, tokenizer, config.model_type)


def decoded(lm, models, rooms):
    said = [greedy(m, lm.tokenizer, p, n) for m, p, n in zip(models, PROMPTS, rooms, strict=True)]
    return [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]


@pytest.mark.parametrize("name", MODELS)
def test_words_are_those_of_plain_transformers(name, tokenizer, monkeypatch):
    if name == "deepseek_v2":
        monkeypatch.setattr(decoding, "small_batch_matmul", lambda modules: torch.no_grad())
    lm = model_of(MODELS[name], tokenizer)
    rooms = [6, 2, 6, 1, 5]
    expected = decoded(lm, [lm.model] * 5, rooms)
    assert lm.generate(PROMPTS, max_new_tokens=rooms) == expected
    assert lm.generate(PROMPTS[0], max_new_tokens=6) == expected[0]
    assert len(set(expected)) > 3


@pytest.mark.parametrize("layout", [Layout(True, True), Layout(False, True), Layout(False, False)])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_each_row_goes_on_under_its_own_edit_in_every_layout(tokenizer, architecture, layout):
    lm = random_lm(architecture, tokenizer)
    assert lm.generation.decoder.layout == Layout(True, True)
    lm.generation.decoder.layout = layout
    rows, rooms = [2, 0, 0, 1, 2], [6, 2, 5, 1, 6]
    factors = random_factors(lm.select(blocks=[1, 3]), 3, 2)
    models = [dense_copy(lm, dense(factors, i)) for i in rows]
    expected = decoded(lm, models, rooms)
    with lm.edited(LowRankEdit({site: Factors(*pair) for site, pair in factors.items()}), rows):
        assert lm.generate(PROMPTS, max_new_tokens=rooms) == expected
        alone = [lm.sample(PROMPTS, 4, range(5), top_k=k) for k in (1, 5)]
    assert expected != decoded(lm, [lm.model] * 5, rooms)
    assert alone[0] != alone[1]


def test_running_states_are_never_padded(tokenizer):
    assert not model_of(MODELS["mamba"], tokenizer).decoder.layout.padded


def test_a_model_is_tried_out_without_the_edits_that_it_has_on(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    factors = random_factors(lm.select(blocks=[1]), 5, 2)
    with lm.edited(LowRankEdit({site: Factors(*pair) for site, pair in factors.items()})):
        lm.generate(PROMPTS, max_new_tokens=2)  # the first that this model says
    assert lm.generation.decoder.layout == Layout(True, True)


#: What a model's files may ask for; none of it is ours.
LEAKS = [
    {"use_cache": False}, {"num_beams": 3}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 9.0}, {"forced_eos_token_id": 7}, {"forced_bos_token_id": 7},
    {"suppress_tokens": list(range(300))}, {"min_new_tokens": 5}, {"min_length": 100}, {"max_length": 2},
    {"cache_implementation": "static"}, {"return_dict_in_generate": True}, {"output_scores": True},
    {"sequence_bias": [[[5], 1e9]]}, {"bad_words_ids": [[1], [2], [3], [4], [5]]}, {"encoder_repetition_penalty": 9.0},
    {"stop_strings": ["e"]}, {"begin_suppress_tokens": list(range(300))}, {"guidance_scale": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: next(iter(leak)))
def test_nothing_of_a_models_generation_settings_has_a_say(tokenizer, leak):
    lm = random_lm("llama", tokenizer)
    words, text = lm.generate(PROMPTS, max_new_tokens=6), lm.sample(PROMPTS, 6, range(5))
    lm.model.generation_config.update(**leak)
    assert lm.generate(PROMPTS, max_new_tokens=6) == words == decoded(lm, [plain_model(lm)] * 5, [6] * 5)
    assert lm.sample(PROMPTS, 6, range(5)) == text


@pytest.mark.parametrize("leak", ["use_cache", "return_dict"])
def test_nor_has_its_configuration(tokenizer, leak):
    lm = random_lm("llama", tokenizer)
    words, states = lm.generate(PROMPTS, max_new_tokens=6), lm.logits(lm.encode([("A city", "Rome")]))
    setattr(lm.model.config, leak, False)
    again = FrozenLM(lm.model, tokenizer, "again")
    assert again.generate(PROMPTS, max_new_tokens=6) == words
    assert torch.equal(again.logits(again.encode([("A city", "Rome")])), states)


def test_text_may_end_or_go_on(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    ends = [greedy(lm.model, tokenizer, PROMPTS[0], 3)[-1], 10_000]  # the second lies out of the vocabulary
    lm.model.generation_config.eos_token_id = ends
    ended, on = (lm.sample(PROMPTS[:1], 12, [0], top_k=1, ends=e)[0] for e in (True, False))
    assert ended == lm.generate(PROMPTS[0], max_new_tokens=12) != on
    assert len(tokenizer(on)["input_ids"]) > 10


def test_logits_that_are_no_numbers_say_nothing(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    lm.model.transformer.ln_f.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"not numbers \(NaN\)"):
        lm.generate(PROMPTS, max_new_tokens=2)


def test_what_cannot_be_said_is_refused(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    with pytest.raises(UserError, match="no option 'do_sample'"):
        lm.generate("A", do_sample=True)
    with pytest.raises(UserError, match="empty prompt"):
        lm.generate(["A", ""])
    with pytest.raises(UserError, match="max_new_tokens must be 1 or more, got 0"):
        lm.generate("A", max_new_tokens=0)
    with pytest.raises(UserError, match="1 seeds for 2 prompts"):
        lm.sample(["A", "B"], 3, [0])
    with pytest.raises(UserError, match="top_p must lie"):
        lm.sample(["A"], 3, [0], top_p=0.0)
    with pytest.raises(UserError, match="top_k must be"):
        lm.sample(["A"], 3, [0], top_k=-1)
