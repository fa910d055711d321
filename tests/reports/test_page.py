"""The page and the tables show a user's text as text, whatever is in it."""

import io
import re

import pytest
from rich.console import Console
from tests.conftest import random_lm

import instructedit as ie
from instructedit.reports import EditCase
from instructedit.reports.table import tables

HOSTILE = '<script>alert("x")</script> [link](http://x) {{ 7 * 7 }} [/bold] & \'"'


@pytest.fixture(scope="module")
def lm(tokenizer):
    return random_lm("gpt2", tokenizer)


def report(lm, count=1):
    request = ie.EditRequest(f"The {HOSTILE} is", HOSTILE, subject=HOSTILE)
    case = EditCase(request, (f"A {HOSTILE}",), (f"B {HOSTILE}",), (f"C {HOSTILE}",))
    return ie.edit(lm, "unedited", [case] * count, neighbours=1, max_new_tokens=2)


def test_the_page_escapes_all_text_and_loads_nothing(lm, tmp_path):
    report(lm).save_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6  # request and target, four prompts
    assert "{{ 7 * 7 }}" in page
    assert not re.search(r"(src|href)\s*=|url\(|@import", page)
    assert "failed; 0 of 1 paraphrases follow; spread to none of 1 neighbours" in page


@pytest.mark.parametrize("count", [1, 4])
def test_tables_show_text_as_it_is(lm, count):
    found = report(lm, count)
    terminal = Console(width=2000, file=io.StringIO())
    for part in tables(found):
        terminal.print(part)
    printed = terminal.file.getvalue()
    assert f"The {HOSTILE} is → {HOSTILE}" in printed
    assert printed.count("failed; 0 of 1 paraphrases follow") == count
    assert ("0 of 4 requests took" in printed) == (count == 4)
