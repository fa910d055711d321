"""A frozen LM in 8 or 4 bits under a float32 editor, and what packed weights refuse."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from tests.conftest import ARCHITECTURES, random_lm
from tests.lm.precisions import PAIRS, REQUESTS, built, logits, saved, trained
from tests.reference import assert_untouched, footprint, random_factors

from instructedit.cli import main
from instructedit.editors import editor_names
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.training.module import LMConfig

pytestmark = pytest.mark.usefixtures("own_cache")

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra 'quantize'"
)


def dense_twin(packed, folder):
    """The same model with the weights that the packed ones stand for, by the library's own unpacking."""
    import bitsandbytes as bnb

    twin = FrozenLM.from_pretrained(str(folder))
    for site in twin.select(every=True):
        layer, own = packed.model.get_submodule(site.name), twin.model.get_submodule(site.name)
        if isinstance(layer, bnb.nn.Linear4bit):
            dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            dense = layer.weight.data.float() * scale.float().unsqueeze(-1) / 127
        own.weight.data = (dense.T if site.transposed else dense).float().contiguous()
    return twin


@pytest.fixture(params=["8bit", "4bit"])
def bits(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tokenizer, tmp_path):
    return saved(random_lm(request.param, tokenizer), tmp_path / "lm")


@pytest.fixture
def packed(folder, bits):
    return FrozenLM.from_pretrained(str(folder), quantize=bits)


@needs_library
class TestPacked:
    def test_sites_have_the_shapes_of_the_maps(self, packed, folder):
        plain = FrozenLM.from_pretrained(str(folder))
        untold = [dataclasses.replace(site, transposed=False) for site in plain.select(every=True)]
        assert list(packed.select(every=True)) == untold
        layer = packed.model.get_submodule(packed.sites[0].name)
        assert not layer.weight.is_floating_point()
        size = sum(t.nbytes for t in packed.model.state_dict().values())
        assert size < 0.75 * sum(t.nbytes for t in plain.model.state_dict().values())

    def test_edits_are_worn_as_over_the_unpacked_weights(self, packed, folder):
        twin = dense_twin(packed, folder)
        edit = LowRankEdit({n: Factors(*f) for n, f in random_factors(packed.sites[-2:], 2, 3, 0.3).items()})
        for applied in (None, edit):
            assert relative(logits(packed, applied), logits(twin, applied)) < 0.05
        change = logits(packed, edit) - logits(packed, None)
        assert relative(change, logits(twin, edit) - logits(twin, None)) < 0.1
        assert change.abs().max() > 0.1

    def test_gradients_reach_every_site_after_passes_without(self, packed, folder):
        twin = dense_twin(packed, folder)
        logits(packed, None)  # a pass without gradients comes first, as in evaluation
        names = [site.name for site in packed.sites[-4:]]
        found, expected = (m.capture(m.encode(PAIRS), names) for m in (packed, twin))
        for name in names:
            assert relative(found.delta[name], expected.delta[name]) < 0.15
            assert relative(found.u[name], expected.u[name]) < 0.05

    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_mend_trains_over_it(self, packed, folder, checkpoint):
        twin = dense_twin(packed, folder)
        packed.checkpoint = checkpoint
        for steps in (1, 3):
            editor, losses = trained(packed, "mend", steps)
            torch.testing.assert_close(losses, trained(twin, "mend", steps)[1], rtol=0.1, atol=0.02)
        assert all(p.isfinite().all() for p in editor.parameters())

    def test_merging_into_it_is_refused(self, packed):
        edit = built("mend", packed).edit(REQUESTS[:1])
        before = footprint(packed)
        with pytest.raises(UserError, match=r"mlp.*8 bits or fewer.*without quantize.*merge") as caught:
            packed.merge(edit)
        assert "\n" not in str(caught.value)
        assert_untouched(packed, before)

    def test_its_fingerprint_is_its_own_and_lasts(self, packed, folder, bits):
        plain = FrozenLM.from_pretrained(str(folder)).fingerprint
        assert packed.fingerprint not in ("", plain)
        logits(packed, None)
        built("mend", packed).edit(REQUESTS)
        del packed.__dict__["fingerprint"]
        again = FrozenLM.from_pretrained(str(folder), quantize=bits)
        assert packed.fingerprint == again.fingerprint

    @pytest.mark.parametrize("name", editor_names())
    def test_every_editor_edits_it(self, name, packed):
        """None reads a weight: they see inputs, outputs and gradients."""
        edit = built(name, packed).edit(REQUESTS)
        assert all(t.isfinite().all() for t in edit.state().values())
        assert logits(packed, edit).isfinite().all()


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("library", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_said(library, bits, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else find(name, *a))
    with pytest.raises(UserError, match=rf"{bits}.*needs .*{library}.*instructedit\[quantize\]"):
        FrozenLM.from_pretrained("tiny", quantize=bits)
    options = [f"--model.lm.quantize={bits}", "--model.editor=Mend", "--model.editor.rank=4", "--trainer.logger=false"]
    assert main(["fit", *options]) != 0
    assert library in capsys.readouterr().err


def test_an_unknown_packing_is_refused():
    with pytest.raises(UserError, match="unknown quantize '3bit'; one of 8bit, 4bit"):
        FrozenLM.from_pretrained("tiny", quantize="3bit")


def test_what_the_model_is_loaded_with_comes_from_the_config(monkeypatch):
    from dataclasses import asdict

    from instructedit.lm import frozen

    asked = {}
    load = frozen.load_model

    def watched(name, options, device):
        asked.update(asdict(options))
        return load(name)

    monkeypatch.setattr(frozen, "load_model", watched)
    FrozenLM.from_pretrained(**LMConfig(quantize="4bit").options())
    assert asked["quantize"] == "4bit"
