"""The script that measures a GPU: time limits, failures, and the dry run on a CPU."""

import json
import sys

import pytest
from tests.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("benchmark/gpu.py")


def test_all_limits_together_stay_below_ten_minutes(script, tmp_path):
    for device in ("cuda", "cpu"):
        found = script.steps(device, tmp_path)
        assert sum(step.limit for step in found) < 600
        assert found[0].name == "tests"
    assert {"gpt2-xl", "llama-2-7b"} <= {step.name.split()[-1] for step in script.steps("cuda", tmp_path)}


def test_a_failure_and_a_time_limit_are_said_and_the_rest_goes_on(script, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    row = {"variant": "warm", "rate": 3.0, "unit": "edits/s", "ratio": 21.0, "floor_share": 0.5, "memory_mb": 10.0}
    figures.write_text(json.dumps({"rows": [row]}))
    python = sys.executable
    chosen = [
        script.Step("breaks", (python, "-c", "print('so it goes'); raise SystemExit(3)"), 60),
        script.Step("hangs", (python, "-c", "import time; time.sleep(600)"), 1),
        script.Step("works", (python, "-c", "pass"), 60, figures),
    ]
    monkeypatch.setattr(script, "steps", lambda device, out: chosen)
    assert script.main(["--out", str(tmp_path / "out")]) == 1
    found = {each["name"]: each for each in json.loads((tmp_path / "out" / "gpu.json").read_text())}
    assert {name: each["state"] for name, each in found.items()} == {
        "breaks": "failed", "hangs": "out of time", "works": "done",
    }  # fmt: skip
    assert found["breaks"]["tail"] == "so it goes"
    assert found["works"]["figures"]["rows"] == [row]
    assert "| works | done | 0 | warm 3.00 edits/s (× 21.0, 50 % of the floor, 10 MB) |" in capsys.readouterr().out


def test_the_dry_run_on_a_cpu(script, tmp_path):
    assert script.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(each["state"] == "done" for each in found)
    assert found[1]["figures"]["rows"][0]["variant"] == "plain"
