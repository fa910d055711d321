"""One process and two report the same: each scores its share of the records, and together they say what one says."""

import json
import os
import subprocess
import sys

import torch
from tests.conftest import random_lm
from tests.editors.test_promises import built

from instructedit.editors import editor_names
from instructedit.evaluation import Evaluation, evaluate_batch
from instructedit.records import EditRecord, EditRequest, Probe

QUICK = Evaluation(generate=False, fluency_tokens=0)
SUBJECTS = ("France", "the city", "a man of the sea", "Who", "One river")


def records():
    def record(i, subject):
        request = EditRequest(f"The people of {subject} like", ("cats", "the sea")[i % 2], "counterfact", subject)
        probes = (
            Probe("generalization", f"What do the people of {subject} like?", (request.target,)),
            Probe("locality", "A man was", ("here",)),
        )
        return EditRecord(f"r{i}", request, probes)

    return [record(i, subject) for i, subject in enumerate(SUBJECTS)]


def scores(tokenizer, rank, world):
    """Editor → record → its log-likelihoods, of this process's records."""
    lm, found = random_lm("gpt2", tokenizer), {}
    for name in editor_names():
        rows = evaluate_batch(lm, built(name, lm), records()[rank::world], QUICK).rows
        found[name] = {}
        for row in rows:
            found[name].setdefault(row["record"], []).append(row["log_likelihood"])
    return found


SCRIPT = """
import json, sys, torch
from transformers import AutoTokenizer
from tests.editors.test_processes import scores
torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
json.dump(scores(AutoTokenizer.from_pretrained(folder), rank, 2), open(f"{folder}/{rank}.json", "w"))
"""


def test_two_processes_score_as_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), str(rank)], env=environment) for rank in (0, 1)
    ]
    whole = scores(tokenizer, 0, 1)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name, expected in whole.items():
        assert set(expected) == {record.id for record in records()}
        for record, values in expected.items():
            (owner,) = [part for part in parts if record in part[name]]
            torch.testing.assert_close(torch.tensor(owner[name][record]), torch.tensor(values), atol=1e-3, rtol=1e-3)
