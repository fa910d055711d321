"""Files of strangers, changed at random: each is read, or refused in one line that names it. `make fuzz` does more."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.targets import CORPUS, FIELDS, TARGETS, outcome, saved, seeds

#: Inputs for each of the targets.
COUNT = int(os.environ.get("FUZZ_COUNT", "20"))

TEXT = st.text(max_size=8) | st.sampled_from([*FIELDS, "{0}", "%s", "[/b]", "../../x", "\ud800", "a" * 3000, "1e999"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | TEXT, inner, max_size=6),
    max_leaves=20,
)
RECORDS = st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8), max_size=3) | VALUES
CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(["put", "drop", "twice"]), st.binary(max_size=6)),
    min_size=1, max_size=4,
)  # fmt: skip


def changed(content: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    """A file with bytes put over others, left out, or doubled."""
    for place, how, given_bytes in changes:
        at, size = place % (len(content) + 1), len(given_bytes) or place % 40
        new = {"put": given_bytes, "drop": b"", "twice": content[at : at + size] * 2}[how]
        content = content[:at] + new + content[at + size :]
    return content


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(gzip.compress(content, 1) if file.suffix == ".gz" else content)
    return file


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files(name, tmp_path):
    saved(tmp_path)
    file, read = TARGETS[name]
    corpus = seeds(name, tmp_path)

    @settings(
        max_examples=COUNT, deadline=None, database=None, derandomize="FUZZ_COUNT" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.builds(changed, st.sampled_from(corpus), CHANGES)
        | RECORDS.map(lambda value: json.dumps(value).encode())
        | st.lists(RECORDS, max_size=3).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())
    )
    def one(content):
        outcome(read, written(tmp_path / file, content))

    one()


@pytest.mark.parametrize("name", [name for name, (file, _) in TARGETS.items() if not file.startswith(("edit", "last"))])
def test_the_corpus(name, tmp_path):
    """What was found once: half surrogates, brackets without end, and aliases that multiply."""
    file, read = TARGETS[name]
    found = [outcome(read, written(tmp_path / file, content)) for content in seeds(name, tmp_path)]
    assert "read" in found
    assert len(set(found)) > 1 or len(found) == 1


def test_the_corpus_holds_what_is_read():
    assert {"counterfact.json", "bank.yaml", "laughs.yaml", "deep.json"} <= {file.name for file in CORPUS.iterdir()}
