"""A small repository with one experiment for a random LM, and how tests run it."""

from __future__ import annotations

import contextlib
import io

import yaml
from mlflow import MlflowClient

from instructedit import tracking
from instructedit.cli import main
from instructedit.experiments import runner

GRID = {
    "title": "A try",
    "seeds": [3, 4],
    "configs": ["configs/all.yaml"],
    "rows": {
        "unedited": {"editor": "unedited", "fit": False},
        "FT-L (raw)": {"editor": "ft_l", "fit": False},
        "MEND": {"editor": "mend", "overrides": ["--trainer.max_steps=1"]},
    },
    "compare": [["MEND", "FT-L (raw)"]],
    "layout": "tall",
    "paper": "paper.csv",
}
SCALE = {"lm": "one", "trainer": "short", "data": [], "editors": ["small"], "paper": "Big"}
PAPER = "model,method,task,metric,mean\nBig,MEND,zsre,reliability,81.25\nOther,MEND,zsre,reliability,12.5\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))


def changed(path, value):
    """The grid with one key set, or taken out."""
    spec = yaml.safe_load(yaml.safe_dump(GRID, sort_keys=False))
    *parents, last = path
    inner = spec
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return {key: value for key, value in spec.items() if value is not None}


def run(store, out, *options):
    """Status and what was printed, on both streams."""
    args = ["experiment", "try", "--scale=one", f"--root={store}", f"--out={out}", *options]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(args)
    return status, printed.getvalue(), errors.getvalue()


def watched(monkeypatch, fails=None, error=None):
    """Which rows and seeds are really run."""
    done = []
    original = runner.run_row

    def run_row(experiment, name, seed, *rest):
        if name == fails:
            raise error
        done.append((name, seed))
        return original(experiment, name, seed, *rest)

    monkeypatch.setattr(runner, "run_row", run_row)
    return done


def parents(store):
    """The experiment's own runs, the newest first, with their tags."""
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    found = tracking.runs(root=store)
    return [client.get_run(run_id) for run_id in found[found["name"] == "try"]["run_id"]]
