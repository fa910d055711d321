"""The command line's small courtesies: versions, the environment, suggestions, lists as people type them, Ctrl-C."""

from __future__ import annotations

import inspect
from typing import Literal

import pytest

import instructedit
from instructedit import commands
from instructedit.cli import main
from instructedit.commands import _listed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"instructedit {instructedit.__version__}\n"


def test_env_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", "/tmp/somewhere")
    assert main(["env"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["instructedit"] == instructedit.__version__
    assert facts["cache"] == facts["INSTRUCTEDIT_CACHE"] == "/tmp/somewhere"
    assert {"python", "torch", "transformers", "device", "threads", "configs"} <= facts.keys()


def test_a_command_that_is_not_there_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["expriment"]) == 2
    assert "unknown command 'expriment' (did you mean 'experiment'?); there are: fit, " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fit", "env"])
def test_an_interrupted_command_says_how_to_go_on(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("instructedit.lightning_cli.run" if name == "fit" else "instructedit.cli.run_command", stop)
    assert main([name]) == 130
    assert ("--ckpt_path" in capsys.readouterr().err) is (name == "fit")


def test_words_behind_the_option_of_a_list_are_its_entries() -> None:
    def command(
        ask: list[str] | None = None, seeds: list[int] | None = None, name: str = "",
        measures: list[Literal["train", "one"]] | None = None,
    ) -> None:  # fmt: skip
        """Stands for any."""

    command.__annotations__ = {name: p.annotation for name, p in inspect.signature(command).parameters.items()}
    typed = ["--ask", "Who is he?", "Where", "--seeds", "0", "1", "--name", "x"]
    assert _listed(command, typed) == ["--ask", '["Who is he?", "Where"]', "--seeds", "[0, 1]", "--name", "x"]
    assert _listed(command, ["--measures", "train", "one"]) == ["--measures", '["train", "one"]']
    assert _listed(command, ["--seeds=[3]", "--ask", '["a"]']) == ["--seeds=[3]", "--ask", '["a"]']


def test_every_command_has_a_line_of_its_own() -> None:
    for name, module in commands.commands().items():
        assert (module.__doc__ or "").strip(), name
