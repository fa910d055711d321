"""Small random LMs of both shapes, made here: no download, no training, no GPU."""

import pytest
import torch

from instructedit.lm import FrozenLM
from instructedit.lm.pretrain import Recipe, new_model, train_tokenizer
from instructedit.tasks.tiny.corpus import documents

ARCHITECTURES = ("gpt2", "llama")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Several test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(documents(0, 1), 600, 128)


def random_lm(architecture, tokenizer, dtype=torch.float32, layers=4, seed=0):
    """A model whose weights are large enough that every part of it matters."""
    recipe = Recipe(architecture=architecture, width=32, layers=layers, heads=4, vocab=600, context=128, seed=seed)
    model = new_model(recipe, tokenizer.eos_token_id)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return FrozenLM(model.to(dtype), tokenizer, f"random-{architecture}")


@pytest.fixture(params=ARCHITECTURES)
def lm(request, tokenizer):
    return random_lm(request.param, tokenizer)
