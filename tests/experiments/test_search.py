"""The search of a grid: which trials are run, again and no more, what they may see, and what comes of them."""

from __future__ import annotations

import json
import shlex
from itertools import product
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from tests.experiments.helpers import GRID, run, watched, write

from instructedit.experiments import Experiment, Grid, Row, Search, search
from instructedit.experiments.search import best_config, best_options
from instructedit.experiments.sections import Results
from instructedit.experiments.sections.search import SearchSection
from instructedit.tracking import runs as stored

RATES, RANKS = [1.0e-4, 1.0], [2, 3]
SEARCH = GRID | {
    "seeds": [3],
    "rows": {"MEND": {"editor": "mend", "configs": ["configs/steps.yaml"], "hidden": True}},
    "compare": [],
    "search": {"base": "MEND", "parameters": {"--model.lr": RATES, "--model.editor.rank": RANKS}},
    "sections": ["search"],
}


@pytest.fixture
def repository(copy):
    write(copy / "configs/steps.yaml", {"trainer": {"max_steps": 2, "val_check_interval": 1}})
    write(copy / "experiments/try/grid.yaml", SEARCH)
    return copy


def fits(monkeypatch, fail=None, error=None):
    """The options of each fit that is begun; the one with number `fail` of them does not come to an end."""
    begun = []
    original = search._Searching._fit

    def fit(self, number, options, watch):
        begun.append(tuple(options))
        if len(begun) - 1 == fail:
            raise error
        return original(self, number, options, watch)

    monkeypatch.setattr(search._Searching, "_fit", fit)
    return begun


def study(store):
    storage = f"sqlite:///{store}/{search.DATABASE}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def test_a_search(repository, tmp_path, monkeypatch):
    store, out = tmp_path / "store", tmp_path / "out"
    every = {(f"--model.lr={lr!r}", f"--model.editor.rank={rank}") for lr, rank in product([0.0001, 1.0], RANKS)}
    with monkeypatch.context() as patch:
        begun = fits(patch, fail=2, error=KeyboardInterrupt())
        assert run(store, out)[0] == 130
    assert len(begun) == 3
    lost = begun[2]

    # As after SIGKILL: a trial that has said nothing since it began.
    left = (every - set(begun)).pop()
    choices = SEARCH["search"]["parameters"]
    running = study(store)
    gone = running.ask(
        {option: optuna.distributions.CategoricalDistribution(values) for option, values in choices.items()}
    )
    assert gone.params == {option: json.loads(value) for option, value in (each.split("=") for each in left)}
    assert [trial.state.name for trial in study(store).trials] == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING"]

    rows = watched(monkeypatch)
    begun = fits(monkeypatch)
    status, printed, errors = run(store, out)
    assert status == 0, errors
    assert set(begun) == {lost, left}  # those that were through are not run again
    assert len(begun) == 2
    assert rows == []  # the hidden row is a base, and no row of its own
    assert "search: 2 of 4 trials to run" in printed

    trials = pd.read_csv(out / "trials.csv")
    found = {(f"--model.lr={t[1]!r}", f"--model.editor.rank={t[2]}") for t in trials.itertuples(index=False)}
    assert found == every
    assert set(trials["state"]) == {"complete"}
    assert trials["score"].is_monotonic_decreasing

    # Each trial is a run under the experiment's: validation alone, with its options and its best score.
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    for trial in trials.itertuples(index=False):
        data = client.get_run(trial.run_id).data
        assert data.tags["search.model.lr"] == repr(trial[1])
        assert float(data.params["lr"]) == trial[1]
        values = [metric.value for metric in client.get_metric_history(trial.run_id, "val/score")]
        assert len(values) == 2
        assert trial.score == pytest.approx(max(values))
        assert data.metrics["search/score"] == pytest.approx(max(values))
        assert not [name for name in data.metrics if name.startswith("test/")]
        assert not [file for file in client.list_artifacts(trial.run_id) if file.path == "tables"]

    # The best options, as a command line and as a config.
    best = trials.to_dict("records")[0]
    options = [f"--model.lr={best['--model.lr']!r}", f"--model.editor.rank={best['--model.editor.rank']}"]
    assert " ".join(options) in printed.replace("\n", " ")
    config = yaml.safe_load((out / "best.yaml").read_text())
    assert config == {"model": {"lr": best["--model.lr"], "editor": {"rank": best["--model.editor.rank"]}}}
    (line,) = [text for text in (out / "best.md").read_text().splitlines() if text.startswith("instructedit ")]
    words = shlex.split(line)
    assert words[:3] == ["instructedit", "experiment", "try"]
    assert Experiment.load("try", "one", overrides=yaml.safe_load(words[-1])).overrides == tuple(options)
    assert {"effects.png", "index.html"} <= {path.name for path in out.iterdir()}

    begun.clear()
    before = len(stored(root=store))
    assert run(store, out)[0] == 0
    assert begun == []
    assert len(stored(root=store)) == before + 1


def test_a_trial_that_fails_has_its_place_and_is_run_again(repository, tmp_path, monkeypatch):
    parameters = {"--model.lr": [0.1, 0.2], "--model.editor.rank": [2]}
    spec = SEARCH | {"search": {"base": "MEND", "parameters": parameters, "sampler": "tpe", "trials": 2}}
    write(repository / "experiments/try/grid.yaml", spec)
    with monkeypatch.context() as patch:
        fits(patch, fail=0, error=RuntimeError("the loss is nan"))
        status, _, errors = run(tmp_path / "store", tmp_path / "out")
    assert status == 0
    assert "instructedit: error: trial 0: the loss is nan" in errors
    trials = pd.read_csv(tmp_path / "out/trials.csv")
    assert trials["state"].tolist() == ["complete", "failed"]
    assert trials["reason"].tolist()[1] == "the loss is nan"
    assert "1 complete, 1 failed" in (tmp_path / "out/index.html").read_text()
    begun = fits(monkeypatch)
    assert run(tmp_path / "store", tmp_path / "out")[0] == 0
    assert len(begun) == 1
    assert pd.read_csv(tmp_path / "out/trials.csv")["state"].tolist() == ["complete", "complete"]


def test_a_pruned_fit_ends_early_and_the_rest_goes_on(repository, tmp_path, monkeypatch):
    """Every trial is stopped, so there is no best one: the search fails, and the row is run all the same."""
    steps = {"trainer": {"max_steps": 3, "val_check_interval": 1}}
    write(repository / "configs/steps.yaml", steps)
    spec = {"base": "MEND", "parameters": {"--model.lr": [0.1]}, "pruner": "median"}
    row = SEARCH["rows"]["MEND"] | {"hidden": False}
    write(
        repository / "experiments/try/grid.yaml",
        SEARCH | {"search": spec, "rows": {"MEND": row}, "sections": ["table"]},
    )
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: optuna.pruners.ThresholdPruner(lower=2.0))
    status, _, errors = run(tmp_path / "store", tmp_path / "out")
    assert status == 2
    assert "instructedit: error: search: no trial of 1 came to an end: all pruned" in errors
    assert errors.splitlines()[-1].endswith("the search failed, see above")
    (trial,) = study(tmp_path / "store").trials
    assert (trial.state.name, sorted(trial.intermediate_values)) == ("PRUNED", [1])
    assert (tmp_path / "out/table.md").is_file()


def test_a_fit_without_a_validation_is_no_trial(repository, tmp_path):
    write(repository / "configs/steps.yaml", {"trainer": {"max_steps": 1, "val_check_interval": 2}})
    spec = {"base": "MEND", "parameters": {"--model.lr": [0.1]}}
    write(repository / "experiments/try/grid.yaml", SEARCH | {"search": spec})
    status, _, errors = run(tmp_path / "store", tmp_path / "out")
    assert status == 2
    assert "no trial of 1 came to an end: its fit logged no val/score: it ended before its first validation" in errors


def test_options_are_of_the_kinds_that_they_were_chosen_as(tmp_path):
    choices = {"--a": [None, 8], "--b": ["auto", 0.5]}
    found = optuna.create_study(direction="maximize")
    for score, (a, b) in enumerate(zip(*choices.values(), strict=True)):
        kinds = {name: optuna.distributions.CategoricalDistribution(own) for name, own in choices.items()}
        found.add_trial(optuna.trial.create_trial(params={"--a": a, "--b": b}, distributions=kinds, value=score))
    trials = search._table(found, Search("MEND", choices))
    assert best_options(trials, [*choices]) == ["--a=8", "--b=0.5"]
    assert best_options(trials.iloc[1:], [*choices]) == ["--a=null", "--b=auto"]
    grid = Grid("t", (0,), {"MEND": Row("mend")}, search=Search("MEND", choices))
    results = Results("t", grid, SimpleNamespace(option="one"), {}, None, {}, trials)
    (listed,) = [panel.frame for panel in SearchSection().show(results) if panel.name == "trials"]
    listed.to_parquet(tmp_path / "trials.parquet")


def test_best_options_are_those_of_a_whole_trial():
    trials = pd.DataFrame(
        {
            "--a": [1, 2, 3],
            "--b": ["[1, 2]", "x", "null"],
            "score": [0.9, 0.5, 0.7],
            "state": ["pruned", *["complete"] * 2],
        }
    )
    options = best_options(trials, ["--a", "--b"])
    assert options == ["--a=3", "--b=null"]
    assert yaml.safe_load(best_config(["--model.lr=5e-05", "--model.editor.sites=[1, 2]", "--x=word"])) == {
        "model": {"lr": 5e-5, "editor": {"sites": [1, 2]}},
        "x": "word",
    }
