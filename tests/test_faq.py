"""Each answer of the FAQ is followed as a user does: every block of the page, in order, in one folder, on a small model."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import instructedit as ie
from instructedit.cli import main

PAGE = Path(__file__).parents[1] / "docs/faq.md"
#: What no test machine has, and what it has instead; the paper's and the real model are the embedded one.
HERE = {
    "--scale smollm2-135m --data real": "--scale tiny-llama", "--scale gpt2-xl --data real": "--scale tiny",
    "smollm2-135m": "tiny", "gpt2-xl": "tiny", "llama-2-7b": "tiny", "--trainer.devices 4": "--trainer.devices 2",
    "mlruns/1/<run>/checkpoints/last.ckpt": "latest", "--seeds 0 1 2": "--seeds 0", "path/to/my-model": "my-model",
}  # fmt: skip
FEW = "--data.test=[{name: counterfact, size: 3}]"
SHORT = ["--trainer.max_steps=2", "--data.val_size=3", FEW]
#: Options that make a command short, by its name.
SHORTER = {
    "fit": SHORT, "test": [FEW], "predict": [FEW],
    "experiment": ["--overrides", json.dumps([*SHORT, "--guards.base_records=0"])],
    "cache": ["--overrides", json.dumps(["--data.train=[{name: counterfact, size: 6}]"])],
}  # fmt: skip


def sections() -> dict[str, list[tuple[str, str]]]:
    """Question → (language, command line or program), in the page's order."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        question, body = part.split("\n", 1)
        steps = []
        for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            steps += [(language, block)] if language == "python" else [(language, line) for line in lines]
        found[question] = steps
    return found


def command(line: str) -> list[str]:
    """The arguments of a command line, made short and fit for this machine."""
    for there, here in HERE.items():
        line = line.replace(there, here)
    args = shlex.split(line, comments=True)[1:]
    return [*args, *SHORTER.get(args[0], [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("faq")
    (made / "facts.csv").write_text("prompt,target\nThe capital of France is,Rome\nThe capital of Spain is,Oslo\n")
    tiny = ie.FrozenLM.from_pretrained("tiny")
    tiny.model.save_pretrained(made / "my-model")
    tiny.tokenizer.save_pretrained(made / "my-model")
    return made


@pytest.mark.parametrize(("question", "steps"), sections().items(), ids=list(sections()))
def test_an_answer(folder, monkeypatch, question, steps):
    """Questions stand on one another only where a later one tests what an earlier one has fitted."""
    assert steps, f"the answer to {question!r} has neither a command nor a program"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    for language, step in steps:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if language == "python":
                exec(compile(step, str(PAGE), "exec"), {})
            elif "trainer.devices" in step:  # Lightning starts the other processes by this one's command line
                line = [sys.executable, "-m", "instructedit.cli", *command(step), "--trainer.accelerator=cpu"]
                ended = subprocess.run(line, check=False, capture_output=True, text=True, timeout=600)
                assert ended.returncode == 0, ended.stderr[-2000:]
                print(ended.stdout)
            else:
                assert main(command(step)) == 0, step
        assert out.getvalue().strip(), f"{step} says nothing"


def test_every_request_of_users_has_its_answer():
    assert len(sections()) == 19
