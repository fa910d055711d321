"""The statistics of datasets: counted again by hand from the raw records, beside the paper's figures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from instructedit.analysis.statistics import dataset_statistics
from instructedit.experiments.runner import RunResult
from instructedit.experiments.sections import Results
from instructedit.experiments.sections.statistics import StatisticsSection
from instructedit.experiments.spec import Grid, Row, published
from instructedit.paths import SHARED
from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.testbed.datasets import raw_records

TITLES = {"recent": "Recent", "convsent": "ConvSent", "zsre": "ZsRE (held out)"}


class Kept(RunResult):
    """A run whose only artifact is a config that the test wrote."""

    def artifact(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("run")
    train = [{"name": "recent"}, {"name": "convsent"}]
    data = {"train": train, "test": [{"name": "convsent", "options": {"cases": 3}}, {"name": "zsre"}], "val_size": 10}
    config = {"data": data, "model": {"lm": {"name": "tiny"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    figures = published(SHARED / "experiments" / "table5" / "paper.csv", "Table 5")
    grid = Grid("t", (0,), {"unedited": Row("unedited", fit=False)})
    rows: dict[str, list[RunResult]] = {"unedited": [Kept("run", 0, pd.DataFrame(), None, TITLES, folder)]}
    results = Results("table5", grid, "one", rows, figures, TITLES)
    return {one.name: one.frame for one in StatisticsSection().show(results) if one.frame is not None}


def test_counts_are_those_of_the_raw_records(shown: dict[str, pd.DataFrame]) -> None:
    frame = shown["statistics"].set_index(["task", "split"])
    raw = {(task, split): raw_records(task, split) for task in TITLES for split in ("train", "val", "test")}
    zsre = frame.loc[("ZsRE (held out)", "test")]
    assert zsre["records"] == zsre["edits"] == len(raw["zsre", "test"])
    assert zsre["generalization"] == len(raw["zsre", "test"])  # one rephrasing each
    groups = [probes for row in raw["zsre", "test"] for probes in row["portability"].values()]
    assert zsre["portability"] == sum(map(len, groups))
    topics = frame.loc[("ConvSent", "test")]
    assert (topics["records"], topics["edits"]) == (len(raw["convsent", "test"]), 3 * len(raw["convsent", "test"]))
    # Ten replies of each sentiment; the one that a case asks for is another case's probe.
    assert (topics["wanted"], topics["opposite"]) == (10 * topics["records"], 10 * topics["records"])
    assert frame.loc[("Recent", "val"), "records"] == 10
    assert frame.loc[("Recent", "train"), "records"] == len(raw["recent", "train"])


def test_the_papers_numbers_stand_beside_ours(shown: dict[str, pd.DataFrame]) -> None:
    paper = shown["statistics"].set_index(["task", "split"])["paper"]
    assert paper[[("Recent", "train"), ("ConvSent", "train"), ("ConvSent", "test")]].tolist() == [570, 14390, 800]
    assert paper["ZsRE (held out)", "test"] == 1037
    assert pd.isna(paper["Recent", "val"])
    assert ("ZsRE (held out)", "train") not in paper.index  # it is not trained on
    assert shown["statistics"]["task"].drop_duplicates().tolist() == ["Recent", "ConvSent", "ZsRE (held out)"]


def test_what_readers_left_out_is_said(shown: dict[str, pd.DataFrame]) -> None:
    left = shown["left-out"]
    assert set(left["what"]) <= {"dropped", "noted"}
    assert (left["count"] > 0).all()


def test_tokens_and_shared_probes() -> None:
    shared = Probe("opposite", "p", ("b a d",))
    cases = [
        EditRecord(f"t/{i}", EditRequest("a b", "c " * i + "d"), (Probe("locality", f"q{i}", ("x",)), shared), "t")
        for i in range(3)
    ]
    (row,) = dataset_statistics({("t", "train"): cases}, lambda text: len(text.split())).to_dict("records")
    assert (row["records"], row["edits"], row["locality"], row["opposite"]) == (1, 3, 3, 1)
    assert (row["tokens"], row["longest"]) == (4, 5)


def test_no_runs_no_statistics() -> None:
    grid = Grid("t", (0,), {"unedited": Row("unedited", fit=False)})
    assert list(StatisticsSection().show(Results("table5", grid, "one", {}, None, {}))) == []
