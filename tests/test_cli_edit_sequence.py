"""`instructedit edit --sequential`: a file of requests, edit after edit."""

import json
import re

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import instructedit as ie
from instructedit.cli import main

FACTS = """prompt,target,subject,rephrase
The capital of France is,Rome,France,France's capital is
"In Chile, officials speak",Quechua,Chile,
The capital of Chile is,Lima,Chile,
"""


@pytest.fixture
def facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.csv").write_text(FACTS)
    return ["edit", "--editor=ft_l", "--scale=tiny", "--requests=facts.csv"]


def test_a_sequence_from_a_file_to_a_model(facts, tmp_path, capsys):
    written = ["--out=curves", "--save=edit", "--merge=model"]
    assert main([*facts, "--sequential", "--score-every", "2", *written]) == 0
    printed = capsys.readouterr().out
    assert "right after" in printed
    assert "3 edits; " in printed
    assert re.search(r"after 3 edits, unrelated text \(\d+ tokens\): KL \d", printed)
    curves = pd.read_csv(tmp_path / "curves" / "curves.csv")
    assert set(curves["edits"]) == {2, 3}
    told = json.loads((tmp_path / "curves" / "sequence.json").read_text())
    assert (told["editor"], told["lm"], told["records"], told["stopped"]) == ("ft_l", "tiny", 3, "")
    lm, edit = ie.FrozenLM.from_pretrained("tiny"), ie.load_edit(tmp_path / "edit")
    ids = torch.tensor([lm.tokenizer("The capital of Chile is")["input_ids"]])
    with lm.edited(edit), torch.no_grad():
        expected = lm.model(ids).logits
        assert lm.generate("The capital of Chile is", 3).strip().startswith("Lima")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    probes = pd.read_csv(tmp_path / "curves" / "probes.csv")
    given = probes[(probes["kind"] == "generalization") & (probes["position"] == 0)]
    assert set(given["prompt"]) == {"France's capital is"}
    assert (probes["kind"] == "locality").any()  # drawn, since the file names none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequential", "--joint"], "--sequential does not go with --joint"),
        (["--sequential", "--keep=x"], "--sequential does not go with --keep"),
        (["--sequential", "--max_new_tokens=3"], "--sequential does not go with --max_new_tokens"),
        (["--out=x"], "add --sequential"),
        (["--sequential", "--out=facts.csv"], "--out facts.csv: is a file"),
        (["--sequential", "--score-every=0"], "score_every must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(facts, capsys, options, message):
    assert main([*facts, *options]) == 2
    assert message in capsys.readouterr().err
