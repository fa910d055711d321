"""Each answer of the FAQ is followed as a user does."""

from __future__ import annotations

import pytest
from tests.pages import REPOSITORY, follow, furnish, steps

ANSWERS = dict(part.split("\n", 1) for part in (REPOSITORY / "docs/faq.md").read_text().split("\n## ")[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return furnish(tmp_path_factory.mktemp("faq"), tokenizer)


@pytest.mark.parametrize("question", ANSWERS)
def test_an_answer(folder, monkeypatch, question):
    """In the page's order: a later answer may test what an earlier one has fitted."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    found = steps(ANSWERS[question])
    assert found, "the answer has neither a command nor a program"
    for language, step in found:
        assert follow(language, step).strip(), f"{step} says nothing"


def test_every_request_of_users_has_its_answer():
    assert len(ANSWERS) == 19
