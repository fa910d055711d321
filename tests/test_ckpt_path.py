"""``--ckpt_path`` means what `load_editor` takes; nothing is scored as a trained editor that was not trained."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import instructedit as ie
from instructedit.cli import main
from instructedit.errors import UserError
from instructedit.lightning_cli import Built, run
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.tracking import runs

RECORD = {
    "prompt": "The capital of Peru is", "target_new": "Lyon", "rephrase": "Peru has the capital",
    "locality": {"Specificity": [{"prompt": "Peru lies in", "ground_truth": "America"}]},
}  # fmt: skip
QUIET = [
    "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--model.evaluation.fluency_tokens=0", "--data.batch_size=1",
]  # fmt: skip
MEND = ["--model.editor=Mend", "--model.editor.rank=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with an LM, a record, and a store with the run of a fit."""
    root = tmp_path_factory.mktemp("ckpt")
    new_model(Recipe(architecture="llama", width=16, layers=3, heads=2, vocab=600, context=128), 0).save_pretrained(
        root / "lm"
    )
    tokenizer.save_pretrained(root / "lm")
    (root / "records.json").write_text(json.dumps([RECORD]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run(arguments("fit", "--model.editor.edit_rate=0.5"))
    return root


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def arguments(command, *more, editor=MEND):
    records = "[{name: counterfact, source: records.json}]"
    stages = ("train", "val") if command == "fit" else ("test", "val")
    data = [f"--data.{stage}={records}" for stage in stages]
    return [command, *QUIET, "--model.lm.name=lm", *editor, *data, *more]


@pytest.fixture(scope="module")
def trained(place):
    """The run's id and its checkpoint."""
    run_id = runs(root=place / "mlruns").iloc[-1].run_id
    return run_id, next(place.rglob(f"{run_id}/checkpoints/last.ckpt"))


def refused(capsys, *args):
    capsys.readouterr()
    assert main(list(args)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("instructedit: error: ")]
    assert len(lines) == 1
    return lines[0]


UNTRAINED = {
    "test": ("Mend", "mend"), "validate": ("Serac", "serac"), "predict": ("CaliNetTrained", "calinet_trained"),
}  # fmt: skip


@pytest.mark.parametrize("command", UNTRAINED)
def test_an_untrained_editor_is_not_scored(capsys, place, command):
    cls, name = UNTRAINED[command]
    said = refused(capsys, *arguments(command, editor=[f"--model.editor={cls}"]))
    assert f"editor '{name}' must be trained first: give --ckpt_path a run's id, folder or checkpoint" in said


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("path", ["last", "best", "hpc"])
def test_a_word_that_finds_no_checkpoint_is_refused(capsys, command, path):
    assert f"--ckpt_path {path}: finds no checkpoint" in refused(capsys, *arguments(command, f"--ckpt_path={path}"))


def test_last_is_taken_where_it_is(trained, tmp_path):
    quiet = ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    run(arguments("fit", *quiet))
    state = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    cli = run(arguments("fit", *quiet, "--ckpt_path=last", "--trainer.max_steps=2"))
    assert state["global_step"] == 1
    assert cli.trainer.global_step == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 2.0), (["--model.editor.reach=3"], 3.0), (["--model.editor.init_args.reach=3"], 3.0),
        (["--model.editor.rank=3"], 2.0), (["--config=reach.yaml"], 2.0),
    ],
)  # fmt: skip
def test_options_that_may_change_after_training_are_the_command_lines_if_it_has_them(tmp_path, place, words, expected):
    editor = ie.build_editor(
        "scope_edit", ie.FrozenLM.from_pretrained("lm"), text="tiny", tokens=200, rank=2, reach=2.0
    )
    editor.save_pretrained(tmp_path / "own")
    (place / "reach.yaml").write_text("model: {editor: {class_path: ScopeEdit, init_args: {reach: 4}}}")
    more = [f"--ckpt_path={tmp_path}/own", "--trainer.logger=false", *words]
    cli = run(arguments("test", *more, editor=["--model.editor=ScopeEdit"]), Built)
    assert (cli.model.editor.reach, cli.model.editor.rank) == (expected, 2)


@pytest.mark.parametrize("source", ["run's id", "run's folder", "checkpoints", "file"])
def test_all_that_load_editor_takes(source, place, trained):
    run_id, file = trained
    given = {"run's id": run_id, "run's folder": file.parent.parent, "checkpoints": file.parent, "file": file}[source]
    cli = run(arguments("test", f"--ckpt_path={given}", "--trainer.logger=false"), Built)
    assert (place / cli.config_init["test"]["ckpt_path"]).samefile(file)
    assert cli.model.editor.options()["edit_rate"] == 0.5  # the checkpoint's own options
    lm = ie.FrozenLM.from_pretrained("lm")
    expected = torch.load(file, weights_only=True)["state_dict"]
    assert torch.equal(ie.load_editor(given, lm).log_alpha, expected["editor.log_alpha"])


def test_a_saved_editor_is_tested(place, trained, tmp_path, caplog, capsys):
    lm = ie.FrozenLM.from_pretrained("lm")
    editor = ie.load_editor(trained[1], lm)
    editor.start_at(7.0)
    editor.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.INFO):
        cli = run(arguments("predict", f"--ckpt_path={tmp_path}/saved", "--trainer.logger=false"))
    torch.testing.assert_close(cli.model.editor.alpha, torch.full_like(editor.alpha, 7.0))
    assert torch.equal(cli.model.editor.state_dict()["log_alpha"], editor.log_alpha)
    said = refused(capsys, *arguments("fit", f"--ckpt_path={tmp_path}/saved"))
    assert "training goes on from a checkpoint" in said


MISSING = {
    "run": ("0" * 32, "no run in mlruns"),
    "folder": ("lm", "no editor here"),
    "file": ("absent.ckpt", "absent.ckpt: no such file"),
    "hub": ("nobody/nothing", "nobody/nothing: neither a local path nor to be had from the hub"),
    "not an editor": ("records.json", "records.json: not a checkpoint of an editor"),
}


@pytest.mark.parametrize(("given", "said"), MISSING.values(), ids=MISSING)
def test_what_is_not_there_is_said(capsys, given, said):
    assert said in refused(capsys, *arguments("test", f"--ckpt_path={given}"))
    with pytest.raises(UserError, match=said):
        ie.load_editor(given, ie.FrozenLM.from_pretrained("lm"))


def test_a_checkpoint_named_in_a_config_is_looked_at_too(capsys, tmp_path):
    (tmp_path / "ckpt.yaml").write_text("ckpt_path: absent.ckpt\n")
    assert "absent.ckpt: no such file" in refused(capsys, *arguments("test", f"--config={tmp_path}/ckpt.yaml"))
