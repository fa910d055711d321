"""Edit sites of many architectures, none of them known by name."""

import pytest
import torch
import transformers as hf
from tests.reference import dense, plain_model, random_factors
from torch import nn

from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM, TokenBatch
from instructedit.lm.sites import add_to_weight, find_blocks, find_layout

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 5, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
WITHOUT_INNER = {key: value for key, value in COMMON.items() if key != "intermediate_size"}

#: Config, then the MLP of block 1 as {name: (in, out, stored [in, out], writes into the residual stream)}.
MODELS = {
    "gpt2": (
        hf.GPT2Config(**GPT),
        {
            "transformer.h.1.mlp.c_fc": (32, 128, True, False),
            "transformer.h.1.mlp.c_proj": (128, 32, True, True),
        },
    ),
    "llama": (
        hf.LlamaConfig(**COMMON),
        {
            "model.layers.1.mlp.gate_proj": (32, 48, False, False),
            "model.layers.1.mlp.up_proj": (32, 48, False, False),
            "model.layers.1.mlp.down_proj": (48, 32, False, True),
        },
    ),
    "opt": (
        hf.OPTConfig(**WITHOUT_INNER, ffn_dim=48, word_embed_proj_dim=32),
        {
            "model.decoder.layers.1.fc1": (32, 48, False, False),
            "model.decoder.layers.1.fc2": (48, 32, False, True),
        },
    ),
    "gpt_neox": (
        hf.GPTNeoXConfig(**COMMON),
        {
            "gpt_neox.layers.1.mlp.dense_h_to_4h": (32, 48, False, False),
            "gpt_neox.layers.1.mlp.dense_4h_to_h": (48, 32, False, True),
        },
    ),
    "qwen2": (
        hf.Qwen2Config(**COMMON, num_key_value_heads=2),
        {
            "model.layers.1.mlp.gate_proj": (32, 48, False, False),
            "model.layers.1.mlp.up_proj": (32, 48, False, False),
            "model.layers.1.mlp.down_proj": (48, 32, False, True),
        },
    ),
    "phi": (
        hf.PhiConfig(**COMMON),
        {
            "model.layers.1.mlp.fc1": (32, 48, False, False),
            "model.layers.1.mlp.fc2": (48, 32, False, True),
        },
    ),
    "gptj": (
        hf.GPTJConfig(**GPT, n_positions=64, rotary_dim=4),
        {
            "transformer.h.1.mlp.fc_in": (32, 128, False, False),
            "transformer.h.1.mlp.fc_out": (128, 32, False, True),
        },
    ),
    "bloom": (
        hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=5, n_head=4),
        {
            "transformer.h.1.mlp.dense_h_to_4h": (32, 128, False, False),
            "transformer.h.1.mlp.dense_4h_to_h": (128, 32, False, True),
        },
    ),
}


class Words:
    """As much of a tokenizer as FrozenLM asks for."""

    model_max_length = 64
    pad_token_id = eos_token_id = 0

    def decode(self, ids):
        return "."


def model_of(config):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    return FrozenLM(model, Words(), config.model_type)


@pytest.fixture(params=MODELS)
def case(request):
    config, expected = MODELS[request.param]
    return model_of(config), expected


def ragged():
    ids = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate((9, 6, 4)):
        mask[row, :length] = 1
        labels[row, length - 3 : length - 1] = ids[row, length - 2 : length]
    return TokenBatch(ids, mask, labels)


def test_the_mlps_of_all_blocks_are_found(case):
    lm, expected = case
    found = {s.name: (s.in_features, s.out_features, s.transposed, s.output) for s in lm.sites if s.block == 1}
    assert found == expected
    assert [s.block for s in lm.sites] == sorted(list(range(5)) * len(expected))
    assert len({s.name for s in lm.sites}) == len(lm.sites)
    for site in lm.sites:
        weight = lm.model.get_submodule(site.name).weight
        assert tuple(weight.shape) == (site.shape if site.transposed else site.shape[::-1])
        assert lm.first_block([site.name]) == site.block


def test_adding_to_a_weight_changes_the_output_by_delta_x(case):
    site = case[0].sites[-1]
    layer = case[0].model.get_submodule(site.name)
    x, delta = torch.randn(3, site.in_features), torch.randn(site.out_features, site.in_features)
    with torch.no_grad():
        before = layer(x)
        add_to_weight(layer, site, delta)
        torch.testing.assert_close(layer(x), before + x @ delta.T, atol=1e-5, rtol=1e-5)


def test_edits_and_prefix_equal_merged_models(case):
    lm, batch = case[0], ragged()
    sites = lm.select(blocks=[-2, -1])
    factors = random_factors(sites, 3, 2)
    edit = LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})
    expected = []
    for i in range(3):
        model = lm.merge(edit[i])
        for site in sites:  # merged as it should be
            stored = model.get_submodule(site.name).weight - lm.model.get_submodule(site.name).weight
            wanted = dense(factors, i)[site.name]
            torch.testing.assert_close(stored, wanted.T if site.transposed else wanted, atol=1e-6, rtol=1e-4)
        size = int(batch.attention_mask[i].sum())
        with torch.no_grad():
            logits = model(batch.input_ids[i : i + 1, :size]).logits[0]
        expected.append(logits[batch.labels[i, :size] != -100])
    found = lm.logits(batch, edit, start=lm.first_block(edit.sites))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_capture_gives_the_weight_gradient(case):
    lm, batch = case[0], ragged()
    names = [s.name for s in lm.select(blocks=[-1])]
    seen = lm.capture(batch, names)
    model = plain_model(lm).requires_grad_(True)
    nll = -model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    losses = [nll[r, p, batch.labels[r, p]] for r, p in (batch.labels != -100).nonzero().tolist()]
    (torch.stack(losses).sum() / 2).backward()  # two answer tokens a row
    for name in names:
        layer = model.get_submodule(name)
        grad = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
        total = torch.einsum("rto,rti->oi", seen.delta[name], seen.u[name])
        torch.testing.assert_close(total, grad, atol=1e-5, rtol=1e-4)


def test_select(case):
    lm, expected = case
    assert [s.name for s in lm.select(blocks=[1])] == list(expected)
    assert lm.select(blocks=[-4]) == lm.select(blocks=[1])
    assert lm.select() == lm.sites
    assert [s.block for s in lm.select(["*" + list(expected)[-1].rsplit(".", 1)[-1]], [-2, 3, 4])] == [3, 4]
    assert [s.name for s in lm.select(list(expected)[:1])] == list(expected)[:1]


@pytest.mark.parametrize("names", [["*.nowhere"], ["*", "transformer.h.4.mlp.c_prj"], ["transformer.h.0.mlp.c_fc"]])
def test_missing_sites_are_named(names):
    lm = model_of(MODELS["gpt2"][0])
    with pytest.raises(UserError, match=names[-1].replace("*", r"\*")) as error:
        lm.select(names, [-1])
    assert "transformer.h.4.mlp.c_proj" in str(error.value)  # what there is instead


@pytest.mark.parametrize("block", [5, -6])
def test_missing_blocks_are_named(block):
    with pytest.raises(UserError, match=f"block {block}: .*5 blocks"):
        model_of(MODELS["gpt2"][0]).select(blocks=[0, block])


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(97, 32)

    def get_input_embeddings(self):
        return self.embedding


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="Bare: no list of transformer blocks"):
        find_layout(Bare())


def test_a_model_without_feed_forward_layers_is_refused():
    config = hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4)
    with pytest.raises(UserError, match="MambaForCausalLM: its blocks have no feed-forward layer of their own"):
        find_layout(hf.MambaForCausalLM(config))


def test_routed_experts_are_refused_where_they_are_chosen():
    lm = model_of(hf.MixtralConfig(**COMMON, num_key_value_heads=4, num_local_experts=2))
    assert find_blocks(lm.model)[0] == "model.layers"
    with pytest.raises(
        UserError, match=r"block 3: model\.layers\.3\.mlp\.experts holds routed experts.*all its blocks"
    ):
        lm.select(blocks=[-1, -2])


def test_dense_blocks_of_a_model_with_routed_experts_can_be_edited():
    lm = model_of(hf.Qwen3MoeConfig(**COMMON, num_experts=2, num_experts_per_tok=1, mlp_only_layers=[0, 4]))
    assert {s.block for s in lm.select(blocks=[0, -1])} == {0, 4}
    with pytest.raises(UserError, match=r"block 1: .*choose among the blocks without: 0, 4"):
        lm.select(blocks=[0, 1])
    with pytest.raises(UserError, match="block 1: "):
        lm.select()
    assert {s.block for s in lm.select(["*.mlp.down_proj"])} == {0, 4}  # named, so it is known what is edited


def test_a_model_that_sees_what_follows_is_refused():
    lm = model_of(hf.BertConfig(**COMMON))
    with pytest.raises(UserError, match="BertLMHeadModel: positions see what follows them"):
        _ = lm.sites
    assert {site.mlp for site in model_of(hf.BertConfig(**COMMON, is_decoder=True)).sites} == {
        f"bert.encoder.layer.{i}" for i in range(5)
    }


def test_the_language_tower_is_edited_however_deep_the_other_one_is():
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = hf.Gemma3Config(
        text_config={**COMMON, "num_key_value_heads": 2, "head_dim": 8}, vision_config=vision, mm_tokens_per_image=4
    )
    lm = model_of(config)
    assert find_blocks(lm.model)[0] == "model.language_model.layers"
    assert {site.block for site in lm.sites} == set(range(5))


def test_a_layer_that_sees_all_rows_as_one_is_told_apart_by_rows():
    """OPT's and others' feed-forward layers get [rows · positions, hidden]."""
    lm, batch = model_of(MODELS["opt"][0]), ragged()
    edit = LowRankEdit({n: Factors(*pair) for n, pair in random_factors(lm.select(blocks=[-1]), 2, 2).items()})
    with pytest.raises(UserError, match="2 edits and a batch of 3 rows"), lm.edited(edit):
        lm.model(**batch.inputs)
    with pytest.raises(UserError, match="rows names the edits of 2 rows, the batch has 3"), lm.edited(edit, [0, 1]):
        lm.model(**batch.inputs)
    with lm.edited(edit, [0, 0, 1]), torch.no_grad():
        found = lm.model(**batch.inputs).logits
    for row, which in enumerate((0, 0, 1)):
        with torch.no_grad():
            expected = lm.merge(edit[which])(batch.input_ids[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_reading_what_a_layer_gave_is_not_touched_by_what_is_added_to_it_later():
    """Falcon adds its attention's output to that of its feed-forward layer in place."""
    lm, batch = model_of(hf.FalconConfig(**WITHOUT_INNER, ffn_hidden_size=48)), ragged()
    layers = [lm.forward.block_name(2) + ".mlp", lm.forward.block_name(4)]
    seen = lm.record_activations(batch, layers)[layers[0]]
    with torch.no_grad():
        torch.testing.assert_close(seen.outputs, lm.model.get_submodule(layers[0])(seen.inputs))
