"""The recipe of the embedded LMs, and the LMs that ship."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import instructedit.testbed.pretrain as recipe_of
from instructedit.lm import FrozenLM
from instructedit.testbed import EMBEDDED
from instructedit.testbed.pretrain import Recipe, batches, pretrain, recall

SMALL = {"passes": 1, "width": 32, "layers": 2, "heads": 2, "vocab": 600, "batch_tokens": 2048, "bf16": False}


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    """A corpus that trains in a second."""
    whole = recipe_of.documents
    monkeypatch.setattr(recipe_of, "documents", lambda seed, passes: list(whole(seed, 1))[:900])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_cut_off_run_goes_on_to_the_same_model(architecture, tmp_path, monkeypatch):
    recipe = Recipe(architecture=architecture, **SMALL)
    monkeypatch.setattr(recipe_of, "recall", lambda *_: {})
    pretrain(recipe, tmp_path / "whole", half=False)
    cut = tmp_path / "cut"
    step = torch.optim.Muon.step
    taken = []

    def stop(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Muon, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, cut, checkpoint_every=5, half=False)
    assert (cut / "checkpoint.pt").exists()
    monkeypatch.setattr(torch.optim.Muon, "step", step)
    pretrain(recipe, cut, checkpoint_every=5, half=False)
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (cut / "checkpoint.pt").exists()
    assert FrozenLM.from_pretrained(str(cut)).generate("The capital of", max_new_tokens=2)


def test_batches_hold_every_document_once_and_hardly_any_padding():
    import random

    documents = [[i] * (1 + i % 37) for i in range(500)]
    made = batches(documents, 256, random.Random(0))
    assert sorted(row[0] for batch in made for row in batch) == list(range(500))
    padded = sum(len(batch) * max(map(len, batch)) for batch in made)
    assert padded <= 1.2 * sum(map(len, documents))
    assert all(len(batch) * max(map(len, batch)) <= 256 for batch in made)


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_the_lm_that_ships_knows_its_facts(name):
    lm = FrozenLM.from_pretrained(name)
    figures = recall(lm.model, lm.tokenizer)
    assert figures["train"] >= 0.95
    assert figures["heldout"] >= 0.80
    assert figures["recent"] <= 0.30
    folder = Path(recipe_of.__file__).parent / EMBEDDED[name]
    said = json.loads((folder / "recipe.json").read_text())["recall"]
    assert figures == pytest.approx(said, abs=0.005)
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
    assert 2e6 <= lm.model.num_parameters() <= 4e6


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_any_text_can_be_written_in_its_tokens(name):
    tokenizer = FrozenLM.from_pretrained(name).tokenizer
    for text in ("Zürich, 東京 — naïve\n\ttabs", "The capital of France is Paris.", " 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
