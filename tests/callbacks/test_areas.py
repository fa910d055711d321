"""The dump of editing areas: which records stand for a task."""

from collections import Counter

import torch

from instructedit.callbacks import EditingAreaDump
from instructedit.edits import Factors, LowRankEdit
from instructedit.records import EditRecord, EditRequest


def test_one_record_represents_its_cluster_among_those_of_its_task():
    dump = EditingAreaDump(records_per_task=2)
    records = [
        EditRecord(f"{task}/{i}", EditRequest("p", "t", task=task), cluster=cluster)
        for task in ("a", "b")
        for i, cluster in enumerate("ttuv")
    ]
    edit = LowRankEdit({"w": Factors(torch.randn(8, 1, 3), torch.randn(8, 1, 2))})
    dump._keep(records, edit)
    (kept,) = dump.parts
    assert kept.ids == ["a/0", "a/2", "b/0", "b/2"]
    assert dump.seen == Counter(a=2, b=2)
