"""The torchmetrics classes: averaging by record, repeats, batches, state, and two processes."""

from __future__ import annotations

import math
import pickle
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import instructedit.metrics
from instructedit.metrics import PerRecordMean

Entry = tuple[int, int, int, float]  # record id, cluster, probe, value

#: Cluster 7 holds records 1 and 2, cluster 8 holds record 3; record 1 has two probes, one of record 3's is nan.
#: Record 1: 0.5, record 2: 1.0, record 3: 0.25. Cluster 7: 0.75, cluster 8: 0.25. Mean: 0.5.
ENTRIES: list[Entry] = [(1, 7, 0, 0.0), (1, 7, 1, 1.0), (2, 7, 0, 1.0), (3, 8, 0, 0.25), (3, 8, 1, math.nan)]


def add(metric: PerRecordMean, entries: list[Entry]) -> None:
    ids, clusters, probes, values = zip(*entries, strict=True)
    metric.update(torch.tensor(ids), torch.tensor(clusters), list(probes), torch.tensor(values))


def slow_mean(entries: list[Entry]) -> float:
    """Nested dicts: cluster -> record -> probe -> value."""
    tree: dict[int, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record, cluster, probe, value in entries:
        if not math.isnan(value):
            tree[cluster][record][probe] = value
    clusters = [
        sum(sum(probes.values()) / len(probes) for probes in records.values()) / len(records)
        for records in tree.values()
    ]
    return sum(clusters) / len(clusters) if clusters else math.nan


def test_mean_over_clusters_records_and_probes_by_hand() -> None:
    metric = PerRecordMean()
    add(metric, ENTRIES)
    assert metric.compute().item() == 50.0
    assert metric.higher_is_better
    assert not metric.full_state_update


def test_a_score_may_keep_its_own_unit() -> None:
    metric = PerRecordMean(scale=1.0)
    metric.update([1, 2], [1, 2], [0, 0], [610.0, 590.0])
    assert metric.compute().item() == 600.0


def test_repeated_entries_count_once() -> None:
    metric = PerRecordMean()
    add(metric, ENTRIES)
    add(metric, ENTRIES[:2])
    add(metric, ENTRIES[1:2])
    assert metric.compute().item() == 50.0
    assert len(metric.table()["value"]) == 8


def test_probes_of_one_record_in_different_batches_belong_together() -> None:
    metric = PerRecordMean()
    for entry in reversed(ENTRIES):
        add(metric, [entry])
    assert metric.compute().item() == 50.0


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 6), st.integers(0, 2)),
        st.floats(0, 1, width=32) | st.just(math.nan),
        min_size=1,
        max_size=12,
    ),
    st.lists(st.integers(0, 11), max_size=6),
    st.integers(1, 5),
)
def test_batch_by_batch_equals_all_at_once_and_a_slow_mean(
    scores: dict[tuple[int, int], float], repeats: list[int], size: int
) -> None:
    entries = [(record, record // 3, probe, value) for (record, probe), value in scores.items()]
    entries += [entries[i % len(entries)] for i in repeats]
    whole, parts = PerRecordMean(), PerRecordMean()
    add(whole, entries)
    for start in range(0, len(entries), size):
        add(parts, entries[start : start + size])
    torch.testing.assert_close(parts.compute(), whole.compute(), rtol=0, atol=0, equal_nan=True)
    expected = torch.tensor(100 * slow_mean(entries))
    torch.testing.assert_close(whole.compute(), expected, equal_nan=True)


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = PerRecordMean()
    assert metric([1], [1], [0], [1.0]).item() == 100.0
    assert metric([2], [2], [0], [0.5]).item() == 50.0
    assert metric.compute().item() == 75.0


def test_no_values_is_nan() -> None:
    metric = PerRecordMean()
    metric.update([], [], [], [])
    assert math.isnan(metric.compute())
    metric.update([1], [1], [0], [math.nan])
    assert math.isnan(metric.compute())


def test_compute_and_table_before_any_update() -> None:
    metric = PerRecordMean()
    assert len(metric.table()["value"]) == 0
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(metric.compute())


def test_table_holds_the_entries_as_they_came() -> None:
    metric = PerRecordMean()
    add(metric, ENTRIES)
    table = metric.table()
    assert list(table) == ["cluster", "id", "probe", "value"]
    columns = [np.array(column) for column in zip(*ENTRIES, strict=True)]
    for name, column in zip(("id", "cluster", "probe", "value"), columns, strict=True):
        np.testing.assert_array_equal(table[name], column)
    assert table["id"].dtype == np.int64


def test_reset_forgets_and_instances_share_nothing() -> None:
    first, second = PerRecordMean(), PerRecordMean()
    add(first, ENTRIES)
    second.update([1], [1], [0], [0.0])
    assert first.compute().item() == 50.0
    first.reset()
    first.update([1], [1], [0], [1.0])
    assert (first.compute().item(), second.compute().item()) == (100.0, 0.0)


def test_pickling_keeps_the_entries_and_checkpoints_hold_none() -> None:
    metric = PerRecordMean()
    add(metric, ENTRIES)
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute().item() == 50.0
    add(copy, [(4, 9, 0, 0.0)])
    assert copy.compute().item() == pytest.approx(100 / 3)
    assert metric.compute().item() == 50.0
    assert metric.state_dict() == {}


def test_values_are_detached() -> None:
    metric = PerRecordMean()
    metric.update([1], [1], [0], torch.tensor([1.0], requires_grad=True))
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("values", [[1.0], 1.0, [[1.0, 1.0]]])
def test_lengths_that_differ_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected four \[entries\]"):
        PerRecordMean().update([1, 2], [1, 2], [0, 0], values)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Unreliability'"):
        _ = instructedit.metrics.Unreliability


def on_two_processes(rank: int, folder: str, metrics: list[PerRecordMean]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    uneven, lonely = metrics
    # Rank 1 repeats rank 0's first record, as a padding sampler would; record 3's entries are on both.
    add(uneven, ENTRIES[:4] if rank == 0 else [*ENTRIES[3:], *ENTRIES[:2]])
    warnings.filterwarnings("ignore", "The ``compute`` method")  # rank 1 has no record of the second metric's task
    if rank == 0:
        lonely.update([1], [1], [0], [0.25])
    result = {"uneven": uneven.compute(), "lonely": lonely.compute(), "own": len(uneven.table()["id"])}
    with uneven.sync_context():
        result["all"] = len(uneven.table()["id"])
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one = PerRecordMean()
    add(one, ENTRIES)
    metrics = [PerRecordMean(), PerRecordMean()]
    torch.multiprocessing.spawn(on_two_processes, (str(tmp_path), metrics), nprocs=2)
    for rank, own in enumerate((4, 4)):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["uneven"].item() == one.compute().item() == 50.0
        assert result["lonely"].item() == 25.0
        assert (result["own"], result["all"]) == (own, 8)
