"""Tiny GGUF files and wheels that carry them, written here: what llama.cpp's converter and a package's author do."""

import hashlib
import json
import zipfile

import gguf
import torch
from gguf.quants import dequantize, quantize

from instructedit.testbed.pretrain import Recipe, new_model

#: transformers' names of a llama block's matrices → llama.cpp's.
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama(tokenizer, packed=None):
    """A random LLaMA-style model, its matrices rounded as a GGUF file that packs them would hold them."""
    recipe = Recipe(architecture="llama", width=64, layers=2, heads=2, vocab=600, context=64)
    model = new_model(recipe, tokenizer.eos_token_id).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
            if packed is not None:
                parameter.data = torch.from_numpy(dequantize(quantize(parameter.data.numpy(), packed), packed).copy())
    return model


def write_gguf(file, model, tokenizer, packed=None, architecture="llama", words=True, pre="gpt-2", **more):
    """Writes a LLaMA-style model as llama.cpp's converter does: queries and keys reordered, names of its own."""
    config, writer = model.config, gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in more.items():
        writer.add_uint16(key.replace("__", "."), value)
    if words:
        _add_words(writer, tokenizer, pre)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        if packed is not None and data.ndim == 2:
            writer.add_tensor(_renamed(name), quantize(data, packed), raw_dtype=packed)
        else:
            writer.add_tensor(_renamed(name), data.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name):
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{_NAMES[rest]}.weight"


def _add_words(writer, tokenizer, pre):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def write_wheel(folder, package, version, members):
    """A wheel that `pip download` takes, with these files in it."""
    name = package.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    members = {
        **members, f"{name}/__init__.py": b"raise SystemExit('imported')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    record = "".join(f"{member},,\n" for member in members) + f"{info}/RECORD,,\n"
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in {**members, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(member, content)
    return file


def sha256(data):
    return hashlib.sha256(data).hexdigest()
