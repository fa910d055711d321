"""Scores as files: what they hold, what is refused, and that experiments which are run apart add up to one."""

from __future__ import annotations

import gzip
import math

import pandas as pd
import pytest
from tests.experiments.helpers import run, watched

from instructedit.errors import UserError
from instructedit.experiments import Experiment
from instructedit.experiments.scores import FILE, read_scores, write_scores

TITLES = {"zsre": "ZsRE (held out)", "recent": "Recent"}


def probes(task="zsre", seed=0, **columns):
    """Three probes, of which the last has no exact score; the second record's id looks like a missing value."""
    table = {
        "request_index": [0, 0, 1], "task": task, "record": ["7", "7", "NA"], "cluster": ["7", "7", "NA"],
        "probe": [0, 1, 0], "kind": ["reliability", "locality", "reliability"], "group": ["", "Relation, own", ""],
        "view": "plain", "main": [True, True, False], "prompt": "The capital of France is", "answer": "Lyon",
        "accuracy": [1 / 3, 0.5, 0.0], "exact": [1.0, 0.0, math.nan], "before": "Paris", "after": None, "seed": seed,
    }  # fmt: skip
    return pd.DataFrame(table | columns)


def test_what_is_written_is_read_again_but_for_the_words(tmp_path):
    """Whatever the columns of words are called: a metric of one's own may have any."""
    own = probes(seed=2, heard="in Paris", length=[2.0, math.nan, 3.0])
    tables = {"MEND": pd.concat([probes(), probes("recent", 1)], ignore_index=True), "None, <b>": own}
    write_scores(tables, TITLES, tmp_path / FILE)
    text = gzip.decompress((tmp_path / FILE).read_bytes()).decode()
    assert not any(word in text for word in ("France", "Lyon", "Paris"))
    found = read_scores([tmp_path / FILE])
    assert list(found) == list(tables)
    for name, table in tables.items():
        kept = table.drop(columns=["request_index", "prompt", "answer", "before", "after", "heard"], errors="ignore")
        kept["title"] = kept["task"].map(TITLES)
        pd.testing.assert_frame_equal(found[name][kept.columns], kept, rtol=1e-6, check_dtype=False)
    (tmp_path / "again").mkdir()
    write_scores(found, TITLES, tmp_path / "again" / FILE)
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_files_add_up(tmp_path):
    for seed in (0, 1):
        write_scores({"MEND": probes(seed=seed)}, TITLES, tmp_path / f"{seed}.csv.gz")
    assert read_scores([tmp_path / "0.csv.gz", tmp_path / "1.csv.gz"])["MEND"]["seed"].tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match=r"0\.csv\.gz: MEND, seed 0, is in .*0\.csv\.gz too"):
        read_scores([tmp_path / "0.csv.gz"] * 2)


@pytest.mark.parametrize(
    ("column", "values", "error"),
    [
        ("main", None, "no column 'main'"),
        ("seed", "first", "column 'seed': expected whole numbers"),
        ("probe", 0.5, "column 'probe': expected whole numbers"),
        ("main", "yes", "column 'main': expected True or False"),
        ("accuracy", "high", "column 'accuracy': expected numbers"),
    ],
)
def test_what_is_no_file_of_scores(tmp_path, column, values, error):
    file = tmp_path / "scores.csv"
    table = probes().assign(method="MEND", title="ZsRE").drop(columns=["prompt", "answer", "before", "after"])
    (table.drop(columns=column) if values is None else table.assign(**{column: values})).to_csv(file, index=False)
    with pytest.raises(UserError, match=rf"scores\.csv: {error}"):
        read_scores([file])


def test_a_file_that_is_cut_short_or_missing(tmp_path):
    write_scores({"MEND": probes()}, TITLES, tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"scores\.csv\.gz: cannot be read as scores"):
        read_scores([tmp_path / FILE])
    for absent in (tmp_path / "absent.csv.gz", tmp_path.parent):
        with pytest.raises(UserError, match=r"\.csv\.gz: no such file"):
            read_scores([absent])


def test_a_seed_that_is_in_a_file_beside_is_not_run_too(place, tmp_path, monkeypatch):
    done = watched(monkeypatch)
    write_scores({"MEND": probes(seed=3)}, TITLES, tmp_path / FILE)
    status, _, errors = run(tmp_path / "a", tmp_path / "out", "--rows=[MEND]", f"--beside=['{tmp_path / FILE}']")
    assert status == 2
    assert "--beside: MEND, seed 3, is to be run here too" in errors
    assert done == []


def test_seeds_that_are_run_apart_add_up(place, tmp_path, monkeypatch):
    together, first, second, joined = (tmp_path / name for name in ("both", "first", "second", "joined"))
    assert run(tmp_path / "a", together)[0] == 0
    assert run(tmp_path / "b", first, "--seeds=[3]")[0] == 0

    done = watched(monkeypatch)
    status, printed, errors = run(tmp_path / "c", second, "--seeds=[4]", "--rows=[MEND]", f"--beside=['{first}']")
    assert status == 0, errors
    assert done == [("MEND", 4)]
    assert "FT-L (raw)" in printed
    # the file of the second holds the first one's rows, too; nothing is run
    assert run(tmp_path / "d", joined, "--rows=[]", f"--beside=['{second / FILE}']")[0] == 0
    assert done == [("MEND", 4)]
    for name in ("summary.csv", "differences.csv", "spread.csv"):
        expected = pd.read_csv(together / name)
        keys = [key for key in ("method", "task", "metric") if key in expected]
        for out in (second, joined):
            found = pd.read_csv(out / name)[expected.columns]
            pd.testing.assert_frame_equal(
                found.sort_values(keys, ignore_index=True), expected.sort_values(keys, ignore_index=True), atol=1e-3
            )
    page = (joined / "index.html").read_text()
    assert f"{second / FILE}" in page
    assert "ZsRE (held out)" in page


def test_nothing_to_do(place, tmp_path):
    with pytest.raises(UserError, match="--rows: none given"):
        Experiment.load("try", "one", rows=[])
