"""`instructedit audit`: a run whose results follow from its files, and what is said when one of them has changed."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from instructedit.audit import _scores, shared
from instructedit.cli import main
from instructedit.lightning_cli import run
from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.tracking import runs


def record(i, subject="Peru"):
    return {
        "prompt": f"The capital number {i} of {subject} is", "subject": subject, "target_new": "Lyon",
        "rephrase": f"{subject} has the capital {i}",
        "locality": {"Specificity": [{"prompt": "Peru lies in", "ground_truth": "America"}]},
    }  # fmt: skip


QUIET = [
    "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--model.evaluation.fluency_tokens=0", "--data.batch_size=2",
    "--model.editor=Mend", "--model.editor.rank=2", "--model.editor.edit_rate=0.1", "--guards.base_records=0",
    "--data.train=[{name: counterfact, source: train.json}]", "--data.test=[{name: counterfact, source: test.json}]",
    "--data.val=[{name: counterfact, source: test.json}]", "--model.lm.name=lm", "--results.show=false",
    "--areas.records_per_task=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A folder with a store that holds a fit and its test."""
    root = tmp_path_factory.mktemp("audit")
    recipe = Recipe(architecture="gpt2", width=16, layers=3, heads=2, vocab=600, context=128)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    (root / "train.json").write_text(json.dumps([record(0), record(1, "Mali")]))
    (root / "test.json").write_text(json.dumps([record(2, "Laos"), record(3, " mali "), record(0)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run(["fit", *QUIET])
        run(["test", *QUIET, f"--ckpt_path={runs().run_id[0]}", "--trainer.logger.init_args.run_name=tested"])
    return root


@pytest.fixture
def store(made, tmp_path, monkeypatch):
    """A copy that a test may damage."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def audited(capsys, status, run="tested"):
    capsys.readouterr()
    if status:
        with pytest.raises(SystemExit, match=str(status)):
            main(["audit", run])
    else:
        assert main(["audit", run]) == 0
    return capsys.readouterr().out


def artifact(store, pattern):
    (found,) = [path for path in store.glob(f"mlruns/artifacts/*/*/artifacts/{pattern}") if path.is_file()]
    return found


def test_a_run_that_is_as_it_was(store, capsys):
    said = audited(capsys, 0)
    assert "DIFFERS" not in said
    assert "ok      summary: " in said
    assert "ok      logged means: " in said
    assert "last.ckpt, sha256 " in said
    assert "ok      data of test, counterfact test: test.json" in said
    # record 3's subject is record 1's in other letters; the last one stands in both files
    assert "2 of 3 share a subject, 1 a prompt with the training records of counterfact" in said
    assert said.splitlines()[-1].endswith("nothing differs")


def table(store):
    file = artifact(store, "tables/probes.parquet")
    rows = pd.read_parquet(file)
    rows.loc[rows["kind"] == "reliability", "accuracy"] = 0.75
    rows.to_parquet(file)
    return "summary: counterfact reliability "


def twice(store):
    file = artifact(store, "tables/probes.parquet")
    rows = pd.read_parquet(file)
    pd.concat([rows, rows.head(1)]).to_parquet(file)
    return "probe rows: 1 probes stand twice"


def interval(store):
    file = artifact(store, "tables/summary.parquet")
    summary = pd.read_parquet(file)
    summary.loc[0, "low"] -= 1
    summary.to_parquet(file)
    return f"summary: counterfact {summary.metric[0]} "


def metric(store):
    client = MlflowClient(f"sqlite:///{store}/mlruns/mlflow.db")
    client.log_metric(runs().run_id[0], "test/counterfact/locality", 12.5, step=9)
    return "logged means: test/counterfact/locality 12.5"


def editor(store):
    file = next(store.rglob("last.ckpt"))
    saved = torch.load(file, weights_only=True)
    saved["global_step"] += 1
    torch.save(saved, file)
    return "another file than the one that was tested"


def gone(store):
    next(store.rglob("last.ckpt")).unlink()
    return "last.ckpt is gone"


def data(store):
    (store / "test.json").write_text(json.dumps([record(2, "Laos")]))
    return "data of test, counterfact test: test.json holds other bytes"


@pytest.mark.parametrize("change", [table, twice, interval, metric, editor, gone, data])
def test_what_has_changed_is_said(store, capsys, change, made):
    if change is gone:  # the file's place is absolute: the original must not be taken for the copy
        found = artifact(store, "tested_editor.json")
        found.write_text(found.read_text().replace(str(made), str(store)))
    expected = change(store)
    said = audited(capsys, 1)
    assert expected in said
    assert "differ" in said.splitlines()[-1]


def test_a_run_without_rows_is_refused(store, capsys):
    assert main(["audit", runs().run_id[1]]) == 2
    assert "no artifact 'tables/probes.parquet'" in capsys.readouterr().err
    assert main(["audit", "0" * 32]) == 2
    assert "no run" in capsys.readouterr().err


def test_records_of_two_tasks_may_have_one_id():
    rows = pd.DataFrame({"task": ["a", "b"], "record": "0", "kind": "reliability", "probe": 0, "accuracy": 1.0})
    assert str(_scores(rows)) == "ok      probe rows: 2 of 2 records"
    assert not _scores(rows.assign(task="a")).agrees


def test_what_records_share():
    def one(prompt, subject=None, rephrase="How so?"):
        return EditRecord(
            "r", EditRequest(prompt, "yes", subject=subject), (Probe("generalization", rephrase, ("y",)),)
        )

    train = [one("A b c", "Mali", "What of it?")]
    assert shared(train, [one("x", "mali"), one("what OF  it?"), one("y"), one("a b C", "Mali")]) == (2, 2)
    assert shared([], train) == (0, 0)
