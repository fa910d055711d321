"""Rows that test what another row trained: what they test, and what is run again when something is missing."""

from __future__ import annotations

import pandas as pd
import pytest
from mlflow import MlflowClient
from tests.experiments.helpers import GRID, run, watched, write

from instructedit.experiments import Experiment, runner
from instructedit.tracking import load_table
from instructedit.tracking import runs as stored

OF = GRID | {
    "seeds": [3],
    "rows": {
        "ZsRE alone": {"of": "MEND", "configs": ["configs/zsre.yaml"]},
        "MEND": {"editor": "mend", "overrides": ["--trainer.max_steps=2", "--model.lr=0.01"], "hidden": True},
        "raw": {"editor": "ft_l", "fit": False, "configs": ["configs/zsre.yaml"]},
        "never": {"editor": "unedited", "fit": False, "hidden": True},
    },
    "compare": [["ZsRE alone", "raw"]],
    "sections": ["table", "differences"],
}


@pytest.fixture
def repository(copy):
    write(copy / "configs/zsre.yaml", {"data": {"test": [{"name": "zsre", "size": 3}]}})
    write(copy / "experiments/try/grid.yaml", OF)
    return copy


def names(store):
    """Name of a run to its id; of several the newest."""
    found = stored(root=store).iloc[::-1]
    return dict(zip(found["name"], found["run_id"], strict=True))


def test_rows_of_another_row(repository, tmp_path, monkeypatch):
    store, out = tmp_path / "store", tmp_path / "out"
    with monkeypatch.context() as patch:
        # killed after the fit, before its test
        original = runner.run_row

        def run_row(experiment, name, *rest):
            if name == "ZsRE alone":
                raise KeyboardInterrupt
            return original(experiment, name, *rest)

        patch.setattr(runner, "run_row", run_row)
        assert run(store, out)[0] == 130
    assert set(names(store)) == {"try", "try/MEND/seed-3"}

    done = watched(monkeypatch)
    assert run(store, out)[0] == 0
    assert done == [("ZsRE alone", 3), ("raw", 3)]  # neither the fit again nor the hidden row
    ids = names(store)
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    assert client.get_run(ids["try/ZsRE alone/seed-3"]).data.tags["tests_run"] == ids["try/MEND/seed-3"]
    base, alone, raw = (
        load_table(ids[f"try/{name}/seed-3"], "probes", store) for name in ("MEND", "ZsRE alone", "raw")
    )
    assert set(base["task"]) == {"counterfact", "zsre"}
    assert set(alone["task"]) == {"zsre"}
    # The same editor on the same records, and not another.
    scores = ["record", "probe", "view", "accuracy", "log_likelihood"]
    same = base.loc[base["task"] == "zsre", scores].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone[scores], same, rtol=1e-4)
    assert (alone["log_likelihood"] - raw["log_likelihood"]).abs().max() > 1e-4
    assert set(pd.read_csv(out / "summary.csv")["method"]) == {"ZsRE alone", "raw"}
    assert set(pd.read_csv(out / "differences.csv")["method"]) == {"ZsRE alone"}

    done.clear()
    assert run(store, out)[0] == 0
    assert done == []

    # Its own config has changed, and the checkpoint is there: only the test is run.
    write(repository / "configs/zsre.yaml", {"data": {"test": [{"name": "zsre", "size": 2}]}})
    assert run(store, out, "--rows=['ZsRE alone']")[0] == 0
    assert done == [("ZsRE alone", 3)]

    # The checkpoint is gone: what has its results needs it no more, a changed row needs the fit again.
    done.clear()
    checkpoint = store / client.get_run(ids["try/MEND/seed-3"]).data.tags["checkpoint"]
    checkpoint.unlink()
    assert run(store, out, "--rows=['ZsRE alone']")[0] == 0
    assert done == []
    write(repository / "configs/zsre.yaml", {"data": {"test": [{"name": "zsre", "size": 1}]}})
    status, printed, _ = run(store, out, "--rows=['ZsRE alone']")
    assert (status, done) == (0, [("MEND", 3), ("ZsRE alone", 3)])
    assert "the checkpoint of row 'MEND' is gone: it is run again" in printed


def test_a_row_whose_fit_fails(repository, tmp_path, monkeypatch):
    spec = OF | {"rows": {**OF["rows"], "again": {"of": "MEND"}}}
    write(repository / "experiments/try/grid.yaml", spec)
    done = watched(monkeypatch, "MEND", RuntimeError("out of memory"))
    status, _, errors = run(tmp_path / "store", tmp_path / "out", "--rows=['ZsRE alone', again, raw]")
    assert (status, done) == (2, [("raw", 3)])
    assert "row 'ZsRE alone': out of memory" in errors
    assert "row 'again': row 'MEND', which it tests, failed" in errors  # not tried once more


def test_its_options_come_last_and_its_fingerprint_has_the_fits(repository):
    experiment = Experiment.load("try", "one")
    assert experiment.rows == ("ZsRE alone", "raw")
    arguments = experiment.arguments("ZsRE alone", 3)
    assert arguments[0] == "test"
    own = f"--config={repository}/configs/zsre.yaml"
    assert arguments.index("--trainer.max_steps=2") < arguments.index(own)
    marks = [experiment.fingerprint("ZsRE alone", 3), experiment.fingerprint("raw", 3)]
    changed = OF["rows"]["MEND"] | {"overrides": ["--trainer.max_steps=3"]}
    write(repository / "experiments/try/grid.yaml", OF | {"rows": {**OF["rows"], "MEND": changed}})
    experiment = Experiment.load("try", "one")
    assert experiment.fingerprint("ZsRE alone", 3) != marks[0]
    assert experiment.fingerprint("raw", 3) == marks[1]


def test_what_only_shows_results_is_in_no_fingerprint(repository):
    mark = Experiment.load("try", "one").fingerprint("raw", 3)
    shown = {"layout": "wide", "sections": ["table"], "title": "Another", "note": "Why?", "compare": []}
    write(repository / "experiments/try/grid.yaml", OF | shown)
    assert Experiment.load("try", "one").fingerprint("raw", 3) == mark
