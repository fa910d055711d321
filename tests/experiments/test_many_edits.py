"""The script that compares sequences of edits, from the folders that the command writes to its table and figure."""

import sys

import pandas as pd
import pytest
from tests.scripts import load_script

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
