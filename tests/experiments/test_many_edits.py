"""The scripts beside the experiments on many edits and on ScopeEdit, from their command lines to their tables."""

import sys

import pandas as pd
import pytest
import torch
from tests.quick import QUICK
from tests.scripts import load_script

import instructedit as ie
from instructedit.cli import main

FACTS = """prompt,target,rephrase,locality,locality_answer
The capital of France is,Rome,France's capital is,The capital of Peru is,Lima
The capital of Chile is,Oslo,Chile's capital is,The capital of Peru is,Lima
"""


@pytest.fixture
def script():
    return load_script("many_edits/compare.py")


def test_sequences_stand_side_by_side(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.csv").write_text(FACTS)
    folders = [f"curves/{method}/facts" for method in ("FT-L", "unedited")]
    for folder, editor in zip(folders, ("ft_l", "unedited"), strict=True):
        command = ["edit", "--scale=tiny", f"--editor={editor}", "--requests=facts.csv", "--sequential"]
        assert main([*command, "--score-every=1", f"--out={folder}"]) == 0
    monkeypatch.setattr(sys, "argv", ["compare.py", *folders, "--out=compared"])
    capsys.readouterr()
    script.main()
    assert "FT-L" in capsys.readouterr().out
    found = pd.read_csv("compared/compared.csv")
    assert set(found["edits"]) == {1, 2}
    assert set(found["stream"]) == {"facts"}
    last = found[found["edits"] == 2].pivot_table(index="method", columns="metric", values="mean")
    assert set(last) == {"reliability", "generalization", "locality", "perplexity"}
    curves = pd.read_csv("curves/FT-L/facts/curves.csv")
    expected = curves[(curves["edits"] == 2) & (curves["group"] == "all") & (curves["metric"] == "locality")]
    assert last.loc["FT-L", "locality"] == pytest.approx(expected["mean"].item(), rel=1e-3)
    assert last.loc["unedited", ["locality", "perplexity"]].tolist() == [100, 100]
    assert last.loc["FT-L", "perplexity"] > 100
    assert (tmp_path / "compared/compared.png").stat().st_size > 10_000


def test_what_is_no_sequence(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "none"), f"--out={tmp_path}/out"])
    with pytest.raises(SystemExit):
        script.main()
    assert "none: no curves.csv" in capsys.readouterr().err


def test_every_reach_is_asked_of_the_same_edits_and_is_that_of_the_command(tmp_path, monkeypatch, capsys):
    reach = load_script("many_edits/reach.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.csv").write_text(FACTS)
    torch.manual_seed(0)
    lm = ie.FrozenLM.from_pretrained("tiny")
    ie.build_editor("scope_edit", lm, **QUICK["scope_edit"] | {"edit_rate": 100.0}).save_pretrained("own")
    options = ["--lm=tiny", "--editor=own", "--streams", "facts.csv", "--reaches", "-50", "1", "50", "--out=reach"]
    monkeypatch.setattr(sys, "argv", ["reach.py", *options])
    reach.main()
    assert "generalization" in capsys.readouterr().out
    found = pd.read_csv("reach/reach.csv").pivot_table(index="reach", columns="metric", values="mean")
    assert found.loc[-50, "locality"] == 100  # nothing is in scope
    assert found.loc[50, "locality"] < 100
    command = ["edit", "--editor=own", "--requests=facts.csv", "--sequential", '--options={"reach": 1}', "--out=one"]
    assert main(command) == 0
    curves = pd.read_csv("one/curves.csv")
    curves = curves[curves["group"] == "all"].set_index("metric")["mean"]
    for metric in reach.METRICS:
        assert found.loc[1, metric] == pytest.approx(curves[metric], rel=1e-3), metric


def test_editors_train_in_turn_on_the_same_records(tmp_path, monkeypatch, capsys):
    rate = load_script("scope_edit/rate.py")
    options = ["--scale=tiny", "--data.train=[{name: counterfact, size: 4}]", "--data.batch_size=2"]
    command = ["rate.py", "--editors", "mend", "instructedit", "--passes=2", f"--out={tmp_path}/rate", *options]
    monkeypatch.setattr(sys, "argv", command)
    rate.main()
    found = pd.read_csv(tmp_path / "rate/rate.csv")
    assert found[["editor", "pass", "step"]].value_counts().eq(1).all()
    assert len(found) == 2 * 2 * 2
    assert found["editor"].tolist() == ["mend", "instructedit"] * 4
    assert "instructedit, × rate" in capsys.readouterr().out
