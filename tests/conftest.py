"""Small random LMs of both shapes, made here: no download, no training, no GPU."""

import fnmatch
import functools
import re
import shutil
from pathlib import Path

import pytest
import torch

from instructedit import stores
from instructedit.lm import FrozenLM
from instructedit.testbed.corpus import documents
from instructedit.testbed.pretrain import Recipe, new_model, train_tokenizer

ARCHITECTURES = ("gpt2", "llama")


def pytest_collection_modifyitems(items):
    """Marks the tests of slow.txt, which `make test` leaves out."""
    lines = (Path(__file__).parent / "slow.txt").read_text().splitlines()
    patterns = [line.replace("[", "[[]") for line in lines if line and not line.startswith("#")]
    slow = re.compile("|".join(map(fnmatch.translate, patterns)))
    for item in items:
        if slow.match(item.nodeid.removeprefix("tests/")):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def one_thread():
    """Several test processes share the cores; what sets more (the benchmark) does so for its own test."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def quick_stores(tmp_path_factory):
    """MLflow migrates a new database, and reads all of its migrations at each opening, for seconds: once is enough."""
    make = stores.make_database

    @functools.cache
    def template():
        from mlflow.store.db import utils  # only where a store is made

        patch.setattr(utils, "_get_latest_schema_revision", functools.cache(utils._get_latest_schema_revision))
        file = tmp_path_factory.mktemp("template") / "mlflow.db"
        make(file)
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "make_database", lambda file: shutil.copy(template(), file))
        yield


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
