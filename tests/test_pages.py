"""Every other page is followed as its reader does: each command of ours, in order; tests/test_docs.py runs programs."""

from __future__ import annotations

import re

import pytest
from tests.pages import REPOSITORY, follow, furnish, steps

#: Commands that are not run here, and why.
ELSEWHERE = {
    "instructions": "asks a server of language models; tests/writing has one",
    "benchmark": "takes minutes; tests/benchmark",
    "ui": "serves until it is ended; tests/reports",
    "experiment demo": "run by the test of the FAQ",
    "experiment table3": "the same",
    "edits export rome --lm": "needs an edit of a model in GGUF; tests/lm",
}
#: What a reader of the page has done before.
BEFORE = {"docs/how-to/edit-a-fact.md": [("bash", "instructedit fit --scale tiny --editor mend")]}
#: Pages that have a test of their own, and those that are made of others.
OWN = {"faq.md", "quick-start.md", "changelog.md"}
PAGES = {
    page.relative_to(REPOSITORY).as_posix(): found
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    if page.name not in OWN
    and (found := [step for step in steps(page.read_text()) if re.match(r"(\.venv/bin/)?instructedit ", step[1])])
}


def runs_here(step: str) -> bool:
    return not any(step.split(" ", 1)[1].startswith(left) for left in ELSEWHERE)


@pytest.mark.parametrize("page", PAGES)
def test_a_page(page, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(furnish(tmp_path, tokenizer))
    monkeypatch.setenv("COLUMNS", "200")
    for language, step in BEFORE.get(page, []) + PAGES[page]:
        if runs_here(step):
            assert follow(language, step).strip(), f"{step} says nothing"


def test_what_is_left_out_is_named_and_little():
    left = [step for found in PAGES.values() for _, step in found if not runs_here(step)]
    assert left
    assert len(left) < sum(map(len, PAGES.values())) / 4
