"""Edits that are kept: what is in their folder, which model they fit, their sum, and ranks that can be served."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.conftest import random_lm
from tests.reference import plain_model, random_factors, relative

import instructedit as ie
from instructedit.cli import main
from instructedit.edits import DenseEdit, Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.reports import store
from instructedit.reports.measure import weights_fingerprint
from instructedit.reports.ranks import RANKS, trimmed

FT_L = {"lr": 0.2, "bound": 0.2, "steps": 8}
REQUEST = ie.EditRequest("The capital of Peru is", "Lyon", subject="Peru")
PROBES = [("The capital of Peru is", "Lyon"), ("Tea is", "hot and good"), ("Who are you?", "Me")]


def report_of(lm, request=REQUEST):
    return ie.edit(lm, ie.build_editor("ft_l", lm, **FT_L), request, neighbours=2, max_new_tokens=4)


def low_rank(lm, rank, seed=0, scale=0.05):
    sites = [site for site in lm.sites if site.output][-2:]
    return LowRankEdit({name: Factors(*f) for name, f in random_factors(sites, 1, rank, scale, seed).items()})


# -- the folder --------------------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back_and_can_be_asked_again(lm, tmp_path):
    report = report_of(lm)
    assert store.keep(lm, report, "lyon", tmp_path) == tmp_path / "lyon"
    (kept,) = store.kept_edits(tmp_path)
    edit = kept.load(lm)
    (site,) = edit.sites
    assert torch.equal(edit.delta(site), report.edits[0].delta(site))
    assert kept.report == report.to_dict()
    assert kept.model == {"name": lm.name, "source": lm.source, "fingerprint": weights_fingerprint(lm)}
    (case,) = kept.cases
    assert case == report.requests[0].case
    again = store.report_on(lm, edit, kept.cases, "again", {})
    assert [(a.prompt, a.after.rank) for a in again.requests[0].answers] == [
        (a.prompt, a.after.rank) for a in report.requests[0].answers
    ]
    with pytest.raises(UserError, match="there is an edit 'lyon' already"):
        store.keep(lm, report, "lyon", tmp_path)
    with pytest.raises(UserError, match="unknown edit"):
        store.undo(str(tmp_path / "lyon"), tmp_path / "other")  # not in that store
    assert store.undo("lyon", tmp_path) == tmp_path / "lyon"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "/tmp/x"])
def test_a_name_is_that_of_a_folder(name, tmp_path):
    with pytest.raises(UserError, match="no name for an edit"):
        store.free_place(name, tmp_path)


def test_what_breaks_off_leaves_nothing(lm, tmp_path, monkeypatch):
    report = report_of(lm)
    monkeypatch.setattr(ie.EditReport, "save_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.keep(lm, report, "lyon", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_model_and_a_damaged_folder_are_one_line(tokenizer, tmp_path):
    lm, other = (random_lm("gpt2", tokenizer, seed=seed) for seed in (0, 1))
    folder = store.keep(lm, report_of(lm), "lyon", tmp_path)
    kept = store.kept_edit("lyon", tmp_path)
    with pytest.raises(UserError, match="this edit fits 'random-gpt2'; 'random-gpt2' has other weights"):
        kept.load(other)
    kept.load(random_lm("gpt2", tokenizer, torch.bfloat16))  # the same weights, rounded
    for text in ("[]", "{"):
        (folder / store.REPORT).write_text(text)
        with pytest.raises(UserError, match=r"report.json: damaged"):
            _ = kept.report
    with pytest.raises(UserError, match=r"unknown edit 'lion' \(did you mean 'lyon'\?\)"):
        store.kept_edit("lion", tmp_path)


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["low rank", "dense", "both"])
def test_a_combination_is_the_sum(lm, sort):
    one, other = low_rank(lm, 2, 1), low_rank(lm, 3, 2)
    name = one.sites[0]
    other = LowRankEdit({name: other.factors[name]})  # at one of the sites alone
    dense = [DenseEdit.of({site: each.delta(site) for site in each.sites}) for each in (one, other)]
    parts = {"low rank": [one, other], "dense": dense, "both": [one, dense[1]]}[sort]
    total = store.combined(parts)
    assert isinstance(total, LowRankEdit) == (sort == "low rank")
    assert total.sites == one.sites
    for site in one.sites:
        expected = one.delta(site) + (other.delta(site) if site == name else 0)
        torch.testing.assert_close(total.delta(site), expected)


def test_what_is_no_change_of_weights_is_not_added(lm):
    slots = ie.build_editor("calinet", lm).edit([REQUEST])
    with pytest.raises(UserError, match="cannot be added"):
        store.combined([low_rank(lm, 1), slots])


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_auto_is_the_smallest_rank_that_keeps_all_predicted_tokens(lm):
    edit = low_rank(lm, 20, scale=0.2)
    whole = lm.scores.predictions(lm.encode(PROBES), edit).predicted
    found = trimmed(lm, edit, PROBES, "auto")
    assert found.kept == (len(whole), len(whole))
    assert torch.equal(lm.scores.predictions(lm.encode(PROBES), found.edit).predicted, whole)
    for rank in [size for size in RANKS if size < found.rank]:
        same = lm.scores.predictions(lm.encode(PROBES), edit.compressed(rank)).predicted == whole
        assert not same.all()


def test_the_loss_that_is_named_is_that_of_the_matrices(lm):
    edit = low_rank(lm, 12)
    found = trimmed(lm, edit, PROBES, 8)
    assert found.rank == 8
    small, full = (torch.cat([each.delta(site).flatten() for site in edit.sites]) for each in (found.edit, edit))
    assert found.error == pytest.approx(relative(small, full), rel=1e-4)
    spectra = torch.cat([torch.linalg.svdvals(edit.delta(site)[0]) for site in edit.sites])
    tails = torch.cat([torch.linalg.svdvals(edit.delta(site)[0])[8:] for site in edit.sites])
    assert found.error == pytest.approx((tails.norm() / spectra.norm()).item(), rel=1e-4)
    assert f"{found.error:.1%} of the change lost" in str(found)


def test_a_dense_edit_becomes_an_adapter_that_peft_reads(lm, tmp_path):
    dense = report_of(lm).edits[0]
    found = trimmed(lm, dense, PROBES, "auto")
    lm.save(found.edit, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == found.rank <= 32
    ids = torch.tensor([lm.tokenizer("The capital of Peru is Lyon.")["input_ids"]])
    with lm.edited(found.edit), torch.no_grad():
        expected = lm.model(ids).logits
    adapted = PeftModel.from_pretrained(plain_model(lm), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, expected, atol=2e-3, rtol=1e-3)
    full = trimmed(lm, dense, PROBES, 32)  # the width of the models: no rank is lost
    assert full.error < 1e-5


@pytest.mark.parametrize("rank", [4, 40])
def test_an_adapter_passes_vllms_checks(lm, tmp_path, rank):
    """What vllm/lora/peft_helper.py and vllm/lora/utils.py ask of the two files."""
    lm.save(trimmed(lm, low_rank(lm, rank), PROBES, 16).edit, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert 0 < config["r"] <= 16  # the server's max_lora_rank, unless it is told another
    assert config["lora_alpha"] / config["r"] == 1  # the scaling that it applies
    assert config["bias"] == "none"
    refused = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "trainable_token_indices")
    assert not any(config.get(name) for name in refused)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        front, _, part = name.removesuffix(".weight").rpartition(".")
        assert front.startswith("base_model.model.")
        assert part in ("lora_A", "lora_B")
        assert front.removeprefix("base_model.model.") in config["target_modules"]
        assert tensor.shape[0 if part == "lora_A" else 1] == config["r"]
    assert len(tensors) == 2 * len(config["target_modules"])


def test_more_rows_than_the_matrix_has_are_kept_exactly(lm, tmp_path):
    edit = low_rank(lm, 60)  # of matrices that are 32 wide
    found = trimmed(lm, edit, PROBES, 512)
    lm.save(found.edit, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (found.rank, config["r"], found.error) == (32, 32, 0)


def test_what_has_no_rank_is_an_error(lm):
    with pytest.raises(UserError, match="no change of weights, so it has no rank"):
        trimmed(lm, ie.build_editor("calinet", lm).edit([REQUEST]), PROBES, 8)
    with pytest.raises(UserError, match="the least is 1"):
        trimmed(lm, low_rank(lm, 2), PROBES, 0)


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two edits of the embedded model, kept by the command line."""
    root = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(store.STORE, str(root / "edits"))
        base = ["edit", "--scale=tiny", "--editor=ft_l"]
        assert main([*base, "--prompt=The capital of France is", "--target=Rome", "--keep=rome"]) == 0
        assert main([*base, "--prompt=The capital of Chile is", "--target=Lima", "--keep=lima", "--rank=auto"]) == 0
        assert main(["edits", "combine", "rome", "lima", "both"]) == 0
        yield root


def run(capsys, *args):
    assert main(["edits", *args]) == 0
    return capsys.readouterr().out


def test_the_commands_of_a_store(kept, capsys):
    listed = run(capsys, "list")
    assert all(word in listed for word in ("rome", "lima", "both", "The capital of France is → Rome", "took"))
    assert "The capital of Chile is → Lima: took" in run(capsys, "show", "both")
    asked = run(capsys, "ask", "both", "--prompts", "The capital of France is", "The capital of Chile is")
    assert [word in asked for word in ("Paris.", "Rome.", "Santiago.", "Lima.")] == [True] * 4
    assert "of the 13 prompts that both were asked" in run(capsys, "diff", "rome", "both")
    assert main(["edits", "show", "rom"]) == 2
    assert "did you mean 'rome'?" in capsys.readouterr().err


def test_edits_are_solved_again_together(kept, capsys):
    said = run(capsys, "combine", "rome", "lima", "solved", "--solve", "ft_l")
    assert said.count("took") >= 1
    parts = [store.kept_edit(name, kept / "edits").report for name in ("rome", "solved", "both")]
    assert [part["editor"] for part in parts] == ["ft_l", "ft_l", "sum"]
    assert parts[1]["options"] == parts[0]["options"]
    assert len(parts[1]["requests"]) == 2
    lm = ie.FrozenLM.from_pretrained("tiny")
    solved, total = (store.kept_edit(name, kept / "edits").load(lm) for name in ("solved", "both"))
    assert not torch.allclose(solved.delta(solved.sites[0]), total.delta(total.sites[0]), atol=1e-3)


def test_a_store_that_cannot_be_written_is_found_out_first(kept, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert main(["edits", "combine", "rome", "lima", "new", f"--store={tmp_path}/file"]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_an_edit_leaves_as_an_adapter_and_as_a_model(kept, capsys, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    assert main(["edits", "export", "rome"]) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    said = run(capsys, "export", "rome", "--adapter=~/lora", "--rank=16", "--merge=~/model")
    assert "a LoRA adapter, rank 16: " in said
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 16
    lm = ie.FrozenLM.from_pretrained("tiny")
    ids = torch.tensor([lm.tokenizer("The capital of France is")["input_ids"]])
    with lm.edited(store.kept_edit("rome", kept / "edits").load(lm)), torch.no_grad():
        expected = lm.model(ids).logits
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert main(["edits", "export", "rome", f"--adapter={tmp_path}/model"]) == 2
    assert "holds a model or an adapter already" in capsys.readouterr().err


def test_undo_takes_an_edit_away(kept, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(store.STORE, str(tmp_path))
    import shutil

    shutil.copytree(kept / "edits" / "rome", tmp_path / "rome")
    assert "the model is what it was" in run(capsys, "undo", "rome")
    assert list(tmp_path.iterdir()) == []
    assert "no edits here" in run(capsys, "list")
