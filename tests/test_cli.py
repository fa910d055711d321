"""The command line from end to end: help, configs, fit, test, predict, edit, experiment."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import instructedit as ie
from instructedit.callbacks import EditingAreaDump, Guards, ResultTables
from instructedit.cli import main
from instructedit.commands import commands
from instructedit.data.module import EditData
from instructedit.editors import Editor
from instructedit.evaluation import Evaluation
from instructedit.lightning_cli import Checkpoint
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.paths import SHARED
from instructedit.registry import plugins
from instructedit.tracking import artifact_path, load_table, runs
from instructedit.training.module import EditingModule, LMConfig

TEST = "[{name: counterfact, size: 4}, {name: convsent, size: 3, options: {cases: 2}}, {name: zsre, size: 3}]"
METRICS = {"counterfact": "reliability generalization locality portability", "convsent": "reliability locality fluency"}
ARTIFACTS = ["config.yaml", "data.test.json", "figures/metrics.png", "figures/areas.png", "areas/areas.safetensors"]


def said(*args: str) -> str:
    """What a command prints; it must end well."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            status = main(list(args))
        except SystemExit as exit_:  # --help, --print_config
            status = exit_.code
    assert status == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A small random LM, and room for a store."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    return root


@pytest.fixture(scope="module")
def options(place):
    return [
        *(f"--config={SHARED}/configs/{part}.yaml" for part in ("data/single-task", "editor/instructedit")),
        f"--model.lm.name={place}/lm", "--model.editor.rank=3", "--model.editor.edit_rate=0.1", "--model.lr=1e-3",
        "--model.evaluation.fluency_tokens=8", f"--data.test={TEST}", "--data.batch_size=2", "--data.val_size=3",
        "--data.val=[{name: counterfact}]", "--trainer.accelerator=cpu", "--trainer.max_steps=2",
        "--trainer.val_check_interval=1", f"--trainer.logger.init_args.root={place}/store",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
    ]  # fmt: skip


def row(place, name):
    return runs(root=place / "store").set_index("name").loc[name]


@pytest.fixture(scope="module")
def fitted(place, options):
    """The run of a short fit, with its last checkpoint."""
    said("fit", *options, "--trainer.logger.init_args.run_name=fitted")
    run = row(place, "fitted")
    return run, next(place.rglob(f"{run.run_id}/checkpoints/last.ckpt"))


@pytest.fixture(scope="module")
def tested(place, options, fitted):
    """What `test` of that checkpoint printed, its messages, and its run."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    more = [f"--ckpt_path={fitted[1]}", "--model.editor.rank=7", "--trainer.logger.init_args.run_name=tested"]
    printed = said("test", *options, *more)
    logger.removeHandler(handler)
    return printed, messages, row(place, "tested")


# -- help and configs ---------------------------------------------------------------------------------------------


def test_the_top_names_every_command(capsys):
    assert main([]) == 2
    top = said("--help")
    for name in ("fit", "validate", "test", "predict", *commands()):
        assert re.search(rf"^  {name} +\w", top, re.MULTILINE), name
    assert set(commands()) >= {"edit", "experiment", "pretrain"}


PARTS = {"model": EditingModule, "data": EditData, "checkpoint": Checkpoint, "guards": Guards, "results": ResultTables}
PARTS |= {"areas": EditingAreaDump}


def words(text, option):
    """What a help text says about an option, beside its type and default."""
    after_usage = " ".join(text.partition("\n\n")[2].split())
    found = re.search(rf"(?:^| ){option}\+?[ ,](.*?)\((?:type|required|default)", after_usage)
    assert found, f"{option} is not explained"
    rest = re.sub(rf"{option}(\+|\.help)", "", found[1])
    assert not re.search(r"\s--\w", rest), f"{option} has no words of its own"
    return re.findall(r"\b[a-z]{2,}\b", re.sub(r"\{.*?\}", "", rest))


def test_fit_explains_every_option():
    text = said("fit", "--help")
    for part, cls in PARTS.items():
        for name in inspect.signature(cls).parameters:
            if (part, name) not in {("model", "lm"), ("model", "evaluation")}:  # groups, whose fields stand below
                assert len(words(text, f"--{part}.{name}")) >= 2, name
    for group, cls in (("lm", LMConfig), ("evaluation", Evaluation)):
        for name in inspect.signature(cls).parameters:
            assert len(words(text, f"--model.{group}.{name}")) >= 2, name


OWN = [
    ([name, sub], function) if sub else ([name], function)
    for name, module in commands().items()
    for sub, function in (module.main.items() if isinstance(module.main, dict) else [("", module.main)])
]


@pytest.mark.parametrize(
    ("name", "function"), OWN, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_the_other_commands_explain_every_option(name, function):
    text = said(*name, "--help")
    for parameter in inspect.signature(function).parameters:
        assert words(text, f"--{parameter}" if f"--{parameter} " in text else parameter), parameter


@pytest.mark.parametrize("cls", plugins(Editor, "instructedit.editors").values(), ids=lambda cls: cls.__name__)
def test_every_editor_explains_its_options(cls):
    text = said("fit", f"--model.editor.help={cls.__name__}")
    for name in inspect.signature(cls).parameters:
        assert words(text, f"--model.editor.{name}"), name


def test_a_printed_config_gives_itself(tmp_path, options):
    printed = said("fit", *options, "--print_config")
    (tmp_path / "all.yaml").write_text(printed)
    assert said("fit", f"--config={tmp_path}/all.yaml", "--print_config") == printed
    assert yaml.safe_load(printed)["model"]["editor"]["init_args"]["rank"] == 3


# -- fit, test, validate, predict ----------------------------------------------------------------------------------


def test_fit_leaves_a_finished_run_that_can_be_run_again(place, fitted):
    run, checkpoint = fitted
    assert run.status == "FINISHED"
    assert run["metrics.train/loss"] > 0
    config = artifact_path(run.run_id, "config.yaml", place / "store")
    again = yaml.safe_load(said("fit", f"--config={config}", "--print_config"))
    assert again["model"]["editor"]["init_args"]["rank"] == 3
    assert checkpoint.stat().st_size < 300_000
    assert artifact_path(run.run_id, "data.fit.json", place / "store").is_file()


def test_test_prints_the_table_with_intervals(tested):
    printed, _, _ = tested
    for word in ("CounterFact", "ConvSent (held out)", "ZsRE (held out)", "Reliability", "Locality", "Fluency"):
        assert word in printed
    assert len(re.findall(r"\d\.\d \[\d+\.\d, \d+\.\d\]", printed)) >= 10


def test_test_says_what_it_takes_from_the_checkpoint(tested):
    (line,) = [message for message in tested[1] if "the checkpoint's own editor is used" in message]
    assert "editor.init_args.rank = 3 (not 7)" in line
    assert "edit_rate" not in line


def test_test_leaves_tables_figures_and_metrics(place, tested):
    run = tested[2]
    assert run.status == "FINISHED"
    for name in ARTIFACTS:
        assert artifact_path(run.run_id, name, place / "store").stat().st_size > 0, name
    probes, summary = (load_table(run.run_id, name, place / "store") for name in ("probes", "summary"))
    assert set(probes["task"]) == {"counterfact", "convsent", "zsre"}
    assert {"before", "after", "prompt", "answer", "accuracy", "exact", "view"} <= set(probes)
    assert ((summary["low"] <= summary["mean"]) & (summary["mean"] <= summary["high"])).all()
    for task, names in METRICS.items():
        for name in names.split():
            value = summary[(summary["task"] == task) & (summary["metric"] == name)]["mean"].item()
            assert run[f"metrics.test/{task}/{name}"] == pytest.approx(value, abs=0.02), (task, name)


def test_validate(place, options, fitted):
    printed = said("validate", *options, f"--ckpt_path={fitted[1]}", "--trainer.logger.init_args.run_name=validated")
    assert "val/counterfact/reliability" in printed
    assert 0 <= row(place, "validated")["metrics.val/score"] <= 100


def test_predict_shows_words_before_and_after(options, fitted):
    printed = said("predict", *options, f"--ckpt_path={fitted[1]}", "--trainer.logger.init_args.run_name=predicted")
    assert all(word in printed.lower() for word in ("before", "after", "counterfact"))


# -- edit, experiment ----------------------------------------------------------------------------------------------


def test_edit_shows_saves_and_merges(place, fitted, tmp_path):
    lm = ie.FrozenLM.from_pretrained(str(place / "lm"))
    editor = ie.load_editor(fitted[1], lm)
    editor.start_at(3.0)
    editor.save_pretrained(tmp_path / "editor")
    prompt = "The capital of Peru is"
    printed = said(
        "edit", f"--prompt={prompt}", "--target=Lyon", f"--editor={tmp_path}/editor", f"--lm={place}/lm",
        "--task=counterfact", "--ask=[Peru lies in]", "--max_new_tokens=4",
        f"--save={tmp_path}/edit", f"--merge={tmp_path}/merged",
    )  # fmt: skip
    assert all(word in printed for word in ("before", "after", "Peru lies in"))
    edit = ie.load_edit(tmp_path / "edit")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad(), lm.edited(edit):
        edited = lm.model(ids).logits
    assert not torch.allclose(edited, lm.model(ids).logits, atol=1e-2)
    torch.testing.assert_close(model(ids).logits.detach(), edited, rtol=1e-3, atol=1e-3)


def test_edit_takes_the_methods_own_options(place):
    lm = ie.FrozenLM.from_pretrained(str(place / "lm"))
    site = lm.select(blocks=[1])[-1].name
    ask = ["edit", "--prompt=The capital of Peru is", "--target=Lyon", "--editor=ft_l", f"--lm={place}/lm"]
    for bound in (0.05, 0.1):
        options = {"lr": 0.1, "bound": bound, "steps": 3, "blocks": [1]}
        printed = said(*ask, f"--options={json.dumps(options)}", f"--save={place}/ft_l_{bound}")
        assert "failed; " in printed  # in three steps
        assert "for what failed, try a larger lr or bound, or more steps" in printed
        edit = ie.load_edit(place / f"ft_l_{bound}")
        assert edit.sites == (site,)
        assert edit.delta(site).abs().max().item() == pytest.approx(bound)


def test_experiment_demo(place, options, tmp_path):
    overrides = [o for o in options if o.startswith(("--model.lm", "--model.evaluation", "--data", "--trainer"))]
    overrides = [o for o in overrides if "root=" not in o]
    printed = said(
        "experiment", "demo", "--rows=[unedited, InstructEdit, MEND]", f"--root={place}/store", f"--out={tmp_path}/out",
        f"--overrides={overrides}", "--seeds=[3]",
    )  # fmt: skip
    names = {"table.md", "summary.csv", "differences.csv", "metrics.png", "areas.png"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(word in table for word in ("unedited", "InstructEdit", "MEND", "CounterFact"))
    assert "InstructEdit − MEND" in printed
    found = runs(root=place / "store")
    parent = found[found["name"] == "demo"].iloc[0]
    children = found[found["parent"] == parent.run_id]
    assert set(children["name"]) == {f"demo/{name}/seed-3" for name in ("unedited", "InstructEdit", "MEND")}
    assert set(children["status"]) == {"FINISHED"} == {parent.status}
    assert artifact_path(parent.run_id, "figures/areas.png", place / "store").is_file()
    assert Path(artifact_path(parent.run_id, "table.md", place / "store")).read_text() == table
