"""What a grid is run as: its command line, its folders, and the names of its rows in the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

from tests.experiments.helpers import GRID, SCALE, write

from instructedit.cli import main
from instructedit.experiments import Experiment


def test_the_command_of_an_experiment_is_that_experiment(copy, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    plain = Experiment.load("try", "one")
    assert plain.command == "instructedit experiment try --scale one --seeds '[3, 4]'"
    other = Experiment.load("try", "one", [3], ["MEND"], "~/store", "~/my page", ["--trainer.max_steps=2"], True)
    assert (other.root, other.out) == (Path("/home/me/store"), Path("/home/me/my page"))
    loaded = []
    monkeypatch.setattr(Experiment, "run", lambda self: loaded.append(self))
    for each in (plain, other):
        assert main(shlex.split(each.command)[1:]) == 0
        assert vars(loaded.pop()) | {"published": None} == vars(each) | {"published": None}


def test_the_results_of_a_task_at_a_scale_of_ones_own_are_in_one_folder(copy, tmp_path_factory, monkeypatch):
    own = tmp_path_factory.mktemp("own") / "mine.yaml"
    write(own, SCALE | {"lm": str(copy / "configs/lm/one.yaml"), "trainer": str(copy / "configs/trainer/short.yaml")})
    loaded = []
    monkeypatch.setattr(Experiment, "run", lambda self: loaded.append(self))
    assert main(["experiment", "try", f"--scale={own}", "--task=zsre"]) == 0
    assert loaded[0].out == Path("outputs/try-mine-zsre")


def test_the_name_of_a_row_is_shown_as_it_is(copy, capsys):
    name = "A [/x] [red]"
    row = {"editor": "unedited", "fit": False}
    write(copy / "experiments/try/grid.yaml", GRID | {"rows": {name: row}, "compare": []})
    experiment = Experiment.load("try", "one")
    assert experiment._run_row(1, name, SimpleNamespace(result=lambda *_: name))
    assert f"row 1 of 1: {name}" in capsys.readouterr().out
