"""The quick start is gone through as a newcomer does: every block of the page, in order, in an empty folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest
from tests.pages import steps

from instructedit.cli import main

PAGE = Path(__file__).parents[1] / "docs/how-to/quick-start.md"
#: On another model by this variable: with `smollm2-135m` it is the page as it stands, some twenty minutes.
LM = os.environ.get("QUICK_START_LM", "tiny")
SHORTER = {"smollm2-135m": LM} | ({"max_steps 20": "max_steps 2 --data.val_size 4"} if LM == "tiny" else {})


def page_here() -> str:
    """The page for the model at hand."""
    text = PAGE.read_text()
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which the page was followed, and what each step printed."""
    folder = tmp_path_factory.mktemp("quick-start")
    printed: dict[str, str] = {}
    pytest.importorskip("peft")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        for language, step in steps(page_here()):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if language == "python":
                    exec(compile(step, str(PAGE), "exec"), {})  # our own page
                elif step.startswith("instructedit ") and "--get tiny" not in step:
                    assert main(shlex.split(step, comments=True)[1:]) == 0, step
            printed[step] = out.getvalue()
    return folder, printed


def said(walked, word):
    """What the one step printed that has the word in it."""
    (text,) = [text for step, text in walked[1].items() if word in step]
    return text


def test_the_report_says_whether_the_edit_took(walked):
    text = said(walked, "--keep lyon")
    assert "took" in text
    assert "paraphrase" in text
    assert "neighbour" in text
    assert "Lyon" in (walked[0] / "lyon.html").read_text()


def test_the_kept_edit_is_listed_and_asked(walked):
    assert "lyon" in said(walked, "edits list")
    assert "Lyon" in said(walked, "edits ask")


def test_peft_and_transformers_give_the_edited_words(walked):
    words = re.findall(r"The capital of France is (\w+)", said(walked, "AutoPeftModelForCausalLM"))
    assert words == ["Lyon", "Lyon"]


def test_undone_is_gone(walked):
    assert not (walked[0] / "edits" / "lyon").exists()


def test_most_of_fifty_facts_take(walked):
    assert (walked[0] / "facts.csv").read_text().count("\n") == 51
    (took,) = re.findall(r"(\d+) of 50 requests took", said(walked, "--requests facts.csv"))
    assert int(took) >= 45
    assert (walked[0] / "facts.html").is_file()


def test_a_task_of_ones_own_is_trained_tested_and_edits(walked):
    assert "Reliability" in said(walked, "--ckpt_path latest")
    assert "The capital of France is" in said(walked, "--editor latest --task mytask")
