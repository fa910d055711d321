"""A tiny random model of every causal-LM architecture that the installed transformers can build from its config."""

import functools
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from instructedit.lm import FrozenLM
from instructedit.testbed.pretrain import train_tokenizer
from instructedit.testbed.corpus import documents

HERE = Path(__file__).parent
#: Config fields by what they measure, with the size that a tiny model gets.
SIZES = {field: size for size, fields in yaml.safe_load((HERE / "sizes.yaml").read_text()).items() for field in fields}
#: What single architectures need beside that: model type → fields of its (text) config.
EXCEPTIONS = yaml.safe_load((HERE / "exceptions.yaml").read_text())
LAYERS, VOCAB = 4, 640
#: Architectures of which no tiny model can be made here, and why.
NOT_TRIED = EXCEPTIONS.pop("not tried")
#: Class of the causal LM of each architecture.
CLASSES = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NAMES = tuple(sorted(CLASSES.keys() - NOT_TRIED.keys()))
#: Tokens that a row of a tiny model may have.
CONTEXT = 64


@functools.cache
def tokenizer():
    """The tests' tokenizer, whose tokens all models know."""
    return train_tokenizer(documents(0, 1), 600, CONTEXT)


@functools.cache
def tiny_lm(name):
    """The frozen LM of a tiny random model; the same object for everybody."""
    return FrozenLM(tiny_model(name), tokenizer(), name, max_length=CONTEXT)


def tiny_config(name):
    """The default config of a model type with every size made small."""
    default = CONFIG_MAPPING[name](**EXCEPTIONS.get(name, {}).get("default", {}))
    config = CONFIG_MAPPING[name](**_shrunk(default) | EXCEPTIONS.get(name, {}).get("fields", {}))
    for part in (config, config.get_text_config()):
        part.use_cache = True
    return config


def _shrunk(config):
    """The arguments that make a small config of this kind: sizes, and lists with one entry for each layer."""
    small = {}
    fields = config.to_dict()
    heads, groups = (fields.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    for field, value in fields.items():
        if field in config.sub_configs:
            small[field] = _sub_config(config, field)
        elif isinstance(value, list) and depth and len(value) == depth and len(value) > LAYERS:
            small[field] = _first_of_each(value)
        elif field in SIZES and value is not None and not isinstance(value, list):
            small[field] = SIZES[field]
        elif field.endswith(("token_id", "token_index")) and isinstance(value, int):
            small[field] = _token(field)
    if groups and groups == heads:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _sub_config(config, field):
    part = getattr(config, field)
    return part and {"model_type": part.model_type} | _shrunk(part) | EXCEPTIONS.get(part.model_type, {}).get(
        "fields", {}
    )


def _first_of_each(values):
    """One entry for each kind of layer, the last one for the rest."""
    kinds = [value for i, value in enumerate(values) if value not in values[:i]][:LAYERS]
    return kinds + kinds[-1:] * (LAYERS - len(kinds))


def _token(field):
    """The tokenizer's own end token, or one that it never gives."""
    return 0 if field in ("bos_token_id", "eos_token_id", "pad_token_id") else VOCAB - 1 - sum(map(ord, field)) % 30


def tiny_model(name, dtype=torch.float32):
    """A random model of this architecture, with weights large enough that every part of it matters."""
    config = tiny_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model.to(dtype)
