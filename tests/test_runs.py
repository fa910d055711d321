"""Runs that one can find: what they are called, what `instructedit runs` says of them, and what comes next."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import torch

import instructedit as ie
from instructedit.cli import main
from instructedit.run_names import next_command, run_name, run_tags
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.tracking import artifact_path, load_table, recent_runs

QUIET = [
    "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--model.evaluation.fluency_tokens=0", "--data.batch_size=1",
    "--areas.records_per_task=0", "--data.val_size=2",
]  # fmt: skip
RUN = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """An LM, a task of one's own, and a store with a fit on it and a test of that."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    new_model(Recipe(architecture="llama", width=16, layers=3, heads=2, vocab=600, context=128), 0).save_pretrained(
        root / "lm"
    )
    tokenizer.save_pretrained(root / "lm")
    own = ["--model.lm.name=lm", "--model.editor=InstructEdit", "--model.editor.rank=2", "--model.editor.edit_rate=0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["new-task", "mytask"]) == 0
        assert main(["fit", *QUIET, *own, "--task", "mytask"]) == 0
        assert main(["test", *QUIET, *own, "--task=mytask", "--ckpt_path=latest", "--results.show=false"]) == 0
    return root


def test_names_say_what_runs_are_and_a_test_names_its_fit(place):
    test, fit = recent_runs(place / "mlruns")
    assert [run.info.run_name for run in (fit, test)] == [f"{c} · InstructEdit · lm · seed 0" for c in ("fit", "test")]
    assert test.data.tags["fit_run_id"] == fit.info.run_id
    assert "fit_run_id" not in fit.data.tags
    assert shlex.split(fit.data.tags["command"])[:3] == ["instructedit", "fit", QUIET[0]]
    assert fit.data.tags["mlflow.note.content"] == f"`{fit.data.tags['command']}`"


def test_a_task_of_ones_own_is_trained_and_tested(place):
    test, fit = recent_runs(place / "mlruns")
    table = load_table(test.info.run_id, "probes", place / "mlruns")
    assert set(table["task"]) == {"mytask"}
    assert table["record"].nunique() == 12
    assert "test/mytask/reliability" in test.data.metrics
    assert {name for name in fit.data.tags if name.startswith("data.")} == {"data.mytask/train", "data.mytask/val"}
    assert re.search("Task: mytask\nDescription: .*\nInput: ", "".join(table["prompt"]))


def test_data_and_tables_are_where_the_ui_shows_them(place):
    test, fit = recent_runs(place / "mlruns")
    shown = [(one.dataset.name, one.tags[0].value) for one in fit.inputs.dataset_inputs]
    assert sorted(shown) == [("mytask/train", "train"), ("mytask/val", "val")]
    read = {one.dataset.name: one.dataset for one in test.inputs.dataset_inputs}["mytask/test"]
    assert json.loads(read.profile) == {"num_records": 12}
    tables = artifact_path(test.info.run_id, "tables", place / "mlruns")
    whole = pd.read_parquet(tables / "probes.parquet")
    assert list(pd.read_csv(tables / "probes.csv")["prompt"]) == list(whole["prompt"])


def test_the_fitted_editor_is_a_registered_model_that_mlflow_loads(place, monkeypatch):
    import mlflow

    monkeypatch.chdir(place)
    fit = recent_runs("mlruns")[1]
    uri = f"sqlite:///{place}/mlruns/mlflow.db"
    (model,) = mlflow.MlflowClient(uri).search_registered_models()
    (version,) = model.latest_versions
    assert (model.name, version.version, version.run_id) == ("instructedit-lm", 1, fit.info.run_id)
    assert version.description == fit.data.tags["mlflow.note.content"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.pyfunc.load_model("models:/instructedit-lm/1")
    assert {"task": "mytask"}.items() <= loaded.input_example.iloc[0].to_dict().items()
    requests = [
        ie.EditRequest("The capital of France is", "Lyon", task="mytask"),
        ie.EditRequest("A", "B", task="mytask"),
    ]
    asked = pd.DataFrame([vars(r) for r in requests])[["prompt", "target", "task"]].assign(ask=[None, "Who is A?"])
    words = loaded.predict(asked)
    lm = ie.FrozenLM.from_pretrained("lm")
    edit = ie.load_editor(fit.info.run_id, lm).edit(requests)
    prompts = ["The capital of France is", "Who is A?"]
    assert list(words["ask"]) == prompts
    assert list(words["before"]) == lm.generate(prompts, 10)
    assert list(words["after"]) == lm.generate(prompts, 10, edit)
    short = loaded.predict(asked, params={"max_new_tokens": 3})
    assert list(short["after"]) == lm.generate(prompts, 3, edit)
    with pytest.raises(Exception, match="target"):
        loaded.predict(asked.drop(columns="target"))


def test_a_run_whose_process_is_gone_is_not_shown_as_running(place):
    root = place / "dead"
    code = "import os, sys\nfrom instructedit.tracking import MLflowTracker\n"
    code += f"_ = MLflowTracker(root={str(root)!r}).experiment\nos._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    (run,) = recent_runs(root)
    assert run.info.status == "KILLED"


def test_the_table_has_scores_and_the_next_command(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    test, fit = recent_runs("mlruns")
    capsys.readouterr()
    assert main(["runs", "--count", "1"]) == 0
    printed = capsys.readouterr().out
    assert test.info.run_id in printed
    assert fit.info.run_name not in printed
    assert "1 older ones: --count 2" in printed
    assert re.search(r"mytask \d", printed)
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out
    assert fit.info.run_id in printed
    assert "--ckpt_path" in printed  # of the next command
    assert main(["runs", "--root", "none"]) == 2
    assert "none: no MLflow store" in capsys.readouterr().err


def test_the_next_command_of_a_fit_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    _, fit = recent_runs("mlruns")
    words = shlex.split(next_command(fit.info.run_id, "FINISHED", fit.data.tags))
    assert words[:2] == ["instructedit", "test"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*words[1:], "--print_config"])


def test_what_comes_next():
    tags = run_tags(["fit", "--scale", "tiny", "--ckpt_path", "x.ckpt", "--data.val_size=3"])
    end = f"--scale tiny --data.val_size=3 --ckpt_path {RUN}"
    assert next_command(RUN, "FINISHED", tags) == f"instructedit test {end}"
    assert next_command(RUN, "KILLED", tags) == f"instructedit fit {end}"
    tested = run_tags(["test"], f"mlruns/1/{RUN}/checkpoints/last.ckpt")
    assert next_command("other", "FINISHED", tested) == f'instructedit edit --editor {RUN} --prompt "…" --target "…"'
    assert next_command(RUN, "FINISHED", {}) == next_command(RUN, "FINISHED", run_tags(["test"])) == ""
    cut = run_tags(["fit", "--scale", "tiny", "--data.train=it is " + "long " * 2000])
    assert next_command(RUN, "FINISHED", cut) == ""  # it cannot be given again
    assert "hunter2" not in str(run_tags(["fit", "--trainer.logger.init_args.tracking_uri=mysql://me:hunter2@db/x"]))
    assert run_name("fit", "Mend", "a/b/lm", 3) == "fit · Mend · lm · seed 3"


def test_a_new_store_says_nothing(tmp_path, capfd):
    from instructedit import stores

    stores.make_database(tmp_path / "a.db")
    assert "INFO" not in "".join(capfd.readouterr())
    assert ie.__version__
