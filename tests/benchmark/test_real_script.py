"""The script that compares a real model's speed in two copies of the code, on a small model and records of ours."""

import json
import sys
from pathlib import Path

import pytest
from tests.scripts import load_script


def fact(city, new):
    subject = {"subject": city, "prompt": f"{city} lies in", "target_new": new, "ground_truth": "Spain"}
    alias = [{"prompt": f"The city of {city} lies in", "ground_truth": new}]
    far = [{"prompt": f"The mayor of {city} is", "ground_truth": "Anna"}]
    hop = [{"prompt": f"The continent of {city} is", "ground_truth": "Asia"}]
    probes = {"portability": {"Subject_Aliasing": alias, "Reasoning": hop}, "locality": {"Relation_Specificity": far}}
    return subject | probes


@pytest.fixture
def data(tmp_path):
    facts = [fact(f"City{i}", f"Land{i}") for i in range(40)]
    topics = [{"ent": f"Thing {i}", "pos": [f"I like thing {i}."], "neg": [f"I hate thing {i}."]} for i in range(40)]
    files = {
        "counterfact/train_cf.json": facts, "counterfact/test_cf_first100.json": facts[:3],
        "recent/recent_train.json": facts, "convsent/blender_val.json": topics,
    }  # fmt: skip
    for name, records in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(records))
    return tmp_path


@pytest.fixture
def script():
    return load_script("benchmark/real.py")


def test_what_it_measures(script, data, capsys, monkeypatch):
    monkeypatch.setattr(script, "STEPS", 3)
    for what in ("train", "scores"):
        script.run(what, "tiny", "float32", data)
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["seconds"] > 0
        assert found["peak MB"] > 100
        assert ("scores" in found) == (what == "scores")
    assert found["scores"].keys() == {"reliability", "generalization", "locality", "portability"}


def test_two_copies_in_turn_and_a_copy_that_fails(script, data, tmp_path, monkeypatch, capsys):
    took = iter([8.0, 2.0, 6.0, 1.0])
    given = []

    def measured(what, source, options):
        given.append((what, options[options.index("--dtype") + 1]))
        return {"seconds": next(took), "of": "a step", "peak MB": 100}

    monkeypatch.setattr(script, "measured", measured)
    script.compare("train", "tiny", "bfloat16", data, tmp_path, 2)
    assert given == [("train", "float32"), ("train", "bfloat16")] * 2
    assert "train: 7.00 → 1.50 s a step, 4.67 ×; 100 → 100 MB" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(script, "HERE", Path("/nowhere.py"))
    with pytest.raises(SystemExit, match="train failed"):
        script.measured("train", tmp_path, ["--lm", "tiny"])


def test_help_explains_itself(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    assert "the folder src of the other copy" in capsys.readouterr().out
