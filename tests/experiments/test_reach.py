"""The script that scores a trained ScopeEdit by its reach, from its command line to its table and figure."""

import json
import sys

import pandas as pd
import pytest
import torch
from tests.quick import QUICK
from tests.scripts import load_script

import instructedit as ie


@pytest.fixture
def script():
    return load_script("scope_edit/reach.py")


def raw(number):
    subject = f"Land{number}"
    return {
        "subject": subject, "prompt": f"The capital of {subject} is", "target_new": "Lyon",
        "rephrase": [f"{subject} has the capital"],
        "locality": {"Relation_Specificity": [{"prompt": f"The river of {subject} is", "ground_truth": "Nile"}]},
        "portability": {"Reasoning": [{"prompt": f"The mayor of {subject} sits in", "ground_truth": "Lyon"}]},
    }  # fmt: skip


def test_every_reach_is_scored_and_wider_scopes_let_more_through(script, tmp_path, monkeypatch, capsys):
    lm = ie.FrozenLM.from_pretrained("tiny")
    for task in ("counterfact", "recent"):
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "train.json").write_text(json.dumps([raw(number) for number in range(40)]))
    torch.manual_seed(0)
    editor = ie.build_editor("scope_edit", lm, **QUICK["scope_edit"] | {"edit_rate": 5.0})
    editor.save_pretrained(tmp_path / "own")
    ie.build_editor("instructedit", lm, rank=2, edit_rate=0.5).save_pretrained(tmp_path / "other")
    places = [f"--data={tmp_path}/data", f"--out={tmp_path}/out", "--beside", str(tmp_path / "other")]
    command = ["reach.py", "--lm=tiny", "--editors", str(tmp_path / "own"), "--reaches", "-50", "0", "50", *places]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    found = pd.read_csv(tmp_path / "out/reach.csv")
    assert set(found["method"]) == {"InstructEdit, plain", "InstructEdit, instructed", "ScopeEdit, plain"}
    assert set(found["metric"]) == set(script.METRICS)
    own = found[found["method"] == "ScopeEdit, plain"].pivot_table(
        index="reach", columns=["metric", "task"], values="mean"
    )
    assert (own.loc[-50, ["locality", "neighborhood"]] == 100).all()  # nothing is in scope
    assert own.loc[50, ["locality", "neighborhood"]].min() < 100
    assert (tmp_path / "out/reach.png").stat().st_size > 10_000
    assert "neighborhood" in capsys.readouterr().out
