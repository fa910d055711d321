"""The view of instructions' wordings: groups from the banks, differences and their correction from plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from instructedit.analysis.descriptions import description_dots, description_spread, description_tests
from instructedit.analysis.summary import summarise
from instructedit.errors import UserError
from instructedit.experiments.runner import RunResult
from instructedit.experiments.sections import Results
from instructedit.experiments.sections.descriptions import DescriptionsSection, group_of
from instructedit.experiments.spec import Grid, Row
from instructedit.instructions import InstructionBank, bank_names
from instructedit.paths import SHARED

RECORDS = 30
GROUPS = {"s1": "seen", "s2": "seen", "h": "held out", "n1": "novel", "n2": "novel"}
LIFT = {"s1": 0.5, "s2": 0.6, "h": 0.55, "n1": 0.2, "n2": 0.3}


def accuracy(name: str, seed: int) -> np.ndarray:
    """One value a record: the description's own level, and noise that the records of all descriptions share."""
    shared = np.random.default_rng(0).normal(0, 0.02, RECORDS)
    own = np.random.default_rng(seed + 10 * list(LIFT).index(name)).normal(0, 0.01, RECORDS)
    return LIFT[name] + shared + own


def table(name: str, seed: int) -> pd.DataFrame:
    probes = []
    for i, value in enumerate(accuracy(name, seed)):
        base = {"task": "zsre", "record": f"r{i}", "cluster": f"r{i}", "main": True, "group": ""}
        probes.append(base | {"kind": "reliability", "view": "instructed", "accuracy": value, "agreement": 0.0})
        probes.append(base | {"kind": "locality", "view": "plain", "accuracy": 0.0, "agreement": 0.9})
    return pd.DataFrame(probes)


TABLES = {name: pd.concat([table(name, s).assign(seed=s) for s in (0, 1)], ignore_index=True) for name in LIFT}


def test_groups_come_from_the_banks() -> None:
    tasks = ["counterfact", "recent", "convsent", "zsre"]
    option = "--model.evaluation.description="
    found = [group_of(Row(of="x", overrides=(f"{option}{i}",)), tasks) for i in range(1, 16)]
    assert found == ["seen"] * 9 + ["held out"] + ["novel"] * 5
    assert group_of(Row(of="x", overrides=(f"{option}zs-10",)), ["zsre"]) == "held out"
    assert group_of(Row(of="x"), tasks) is None
    with pytest.raises(UserError, match="no description '16'"):
        group_of(Row(of="x", overrides=(f"{option}16",)), tasks)


@pytest.mark.parametrize("task", ["counterfact", "recent", "convsent", "zsre"])
def test_a_number_is_a_place_in_every_bank(task: str) -> None:
    bank = InstructionBank.for_task(task)
    assert [bank.get(str(i + 1)) for i in range(len(bank.descriptions))] == list(bank.descriptions)
    for wrong in ("0", "16", "-1", "01"):
        with pytest.raises(UserError, match="there are"):
            bank.get(wrong)


def test_the_grid_has_every_description_of_every_bank_once() -> None:
    grid = Grid.load(SHARED / "experiments" / "figure3" / "grid.yaml")
    tasks = ["counterfact", "recent", "convsent", "zsre"]
    assert set(tasks) <= set(bank_names())
    chosen = [row.overrides[0].partition("=")[2] for row in grid.rows.values() if row.of]
    for task in tasks:
        bank = InstructionBank.for_task(task)
        assert [bank.get(number) for number in chosen] == list(bank.descriptions)
    named = {name.rstrip(" 0123456789"): group_of(row, tasks) for name, row in grid.rows.items() if row.of}
    assert named == {"seen": "seen", "held out": "held out", "novel": "novel"}


def test_differences_are_from_the_mean_of_the_seen_ones() -> None:
    found = description_tests(TABLES, GROUPS, resamples=5000)
    assert found[["description", "metric"]].to_records(index=False).tolist() == [
        (name, metric) for metric in ("reliability", "locality") for name in ("h", "n1", "n2", "all novel")
    ]
    own = found[found["metric"] == "reliability"].set_index("description")
    value = {name: np.mean([accuracy(name, s) for s in (0, 1)], axis=0) for name in LIFT}
    seen = (value["s1"] + value["s2"]) / 2
    expected = {"h": value["h"], "n1": value["n1"], "n2": value["n2"], "all novel": (value["n1"] + value["n2"]) / 2}
    for name, theirs in expected.items():
        gap = 100 * (theirs - seen)
        assert own.loc[name, "mean"] == pytest.approx(gap.mean())
        half = 1.96 * gap.std(ddof=1) / np.sqrt(RECORDS)
        assert own.loc[name, "high"] - own.loc[name, "low"] == pytest.approx(2 * half, rel=0.15)
        assert own.loc[name, "n"] == RECORDS
    assert own.loc["all novel", "corrected"] < 0.01
    assert found.loc[found["metric"] == "locality", "p_value"].tolist() == [1.0] * 4


def test_the_correction_is_for_all_tests_of_the_table() -> None:
    found = description_tests(TABLES, GROUPS, resamples=500)
    p = found["p_value"].to_numpy()
    assert (found["corrected"] >= p).all()
    # Holm: at least as strict as Benjamini and Hochberg's, and the smallest p-value counts as often as there are tests.
    assert (found["corrected"] >= false_discovery_control(p) - 1e-12).all()
    assert found["corrected"].min() == pytest.approx(min(1, p.min() * len(p)))


def test_the_spread_is_of_the_descriptions_means() -> None:
    summary = pd.concat([summarise(own, name) for name, own in TABLES.items()])
    spread = description_spread(summary, GROUPS).set_index(["metric", "group"])
    means = {name: 100 * np.mean([accuracy(name, s).mean() for s in (0, 1)]) for name in LIFT}
    row = spread.loc[("reliability", "novel")]
    assert (row["lowest"], row["highest"], row["descriptions"]) == pytest.approx((means["n1"], means["n2"], 2))
    assert row["deviation"] == pytest.approx(np.std([means["n1"], means["n2"]], ddof=1))
    assert np.isnan(spread.loc[("reliability", "held out"), "deviation"])


def test_dots_stand_in_their_groups() -> None:
    summary = pd.concat([summarise(own, name) for name, own in TABLES.items()])
    figure = description_dots(summary, GROUPS, {"zsre": "ZsRE"})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seen", "held out", "novel"]
    axes = figure.axes[0]
    assert (axes.get_title("left"), axes.get_ylabel()) == ("ZsRE", "Reliability")
    drawn = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    means = summary[summary["metric"] == "reliability"].set_index("method")["mean"]
    assert drawn == [
        [[0, means["s1"]], [1, means["s2"]]],
        [[2, means["h"]]],
        [[3, means["n1"]], [4, means["n2"]]],
    ]


def test_the_view() -> None:
    numbers = {"s1": 1, "s2": 2, "h": 10, "n1": 11, "n2": 12}
    rows = {"InstructEdit": Row("instructedit", hidden=True)}
    rows |= {
        name: Row(of="InstructEdit", overrides=(f"--model.evaluation.description={number}",))
        for name, number in numbers.items()
    }
    grid = Grid("A try", (0, 1), rows, options={"descriptions": {"resamples": 400}})
    children = {name: [RunResult("run", s, table(name, s), None, {}, Path()) for s in (0, 1)] for name in numbers}
    results = Results("try", grid, "one", children, None, {"zsre": "ZsRE (held out)"})
    dots, spread, tests = DescriptionsSection().show(results)
    assert dots.figure is not None
    assert spread.frame is not None
    assert tests.frame is not None
    assert set(spread.frame["group"]) == {"seen", "held out", "novel"}
    assert set(tests.frame["task"]) == {"ZsRE (held out)"}
    assert "400 samples" in tests.note
    assert "this table, 8 (Holm)" in tests.note
    plain = Grid("A try", (0,), {"s1": Row("mend")})
    only = {"s1": children["s1"]}
    assert list(DescriptionsSection().show(Results("try", plain, "one", only, None, {"zsre": "ZsRE"}))) == []
