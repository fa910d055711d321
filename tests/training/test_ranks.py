"""n processes are one with the same global batch: losses, normaliser, gradients, and each test record once."""

from __future__ import annotations

import json

import pytest
import torch
from tests.conftest import random_lm
from tests.ranks import as_torchrun, forked, free_port, in_ranks
from torch import distributed

import instructedit as ie
from instructedit.data.batch import Collator
from instructedit.data.module import EditData
from instructedit.editors.losses import LossWeights
from instructedit.lightning_cli import run
from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.testbed.pretrain import Recipe, new_model

#: Locality probes of each of four records: the first process has all but one, of three records; or the second none.
PROBES = {"uneven": (2, 1, 0, 1), "one process has none": (1, 2, 0, 0), "nobody has any": (0, 0, 0, 0)}


def records(probes):
    def record(i, count):
        request = EditRequest(f"The people of town {i} like", ("cats", "the sea")[i % 2], "counterfact")
        asked = tuple(Probe("locality", f"A man {i} was {j}", ("here",)) for j in range(count))
        return EditRecord(f"r{i}", request, (Probe("generalization", f"In {i} they like", ("cats",)), *asked))

    return [record(i, count) for i, count in enumerate(probes)]


def step(lm, of, steps=2):
    """Losses, gradients and normaliser after two steps of training on the same records; gradients without a sum."""
    torch.manual_seed(0)
    editor = ie.build_editor("mend", lm, rank=4, edit_rate=0.1).train().to(lm.model.dtype)
    collate = Collator(lm.text, None)
    for number in range(steps):
        editor.zero_grad()
        batch = collate([(number, record) for record in of])
        parts = editor.training_loss(batch, LossWeights())
        parts["loss"].backward()
    found = {name: value.detach() for name, value in parts.items()}
    found |= {f"grad {name}": value.grad for name, value in editor.named_parameters() if value.grad is not None}
    return found, dict(editor.named_buffers())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("probes", PROBES.values(), ids=PROBES)
def test_a_step_of_several_processes_is_that_of_one(tokenizer, world, probes, dtype, tolerance):
    """But for how sums are rounded: in double precision nothing else is left between them."""
    lm, every = random_lm("gpt2", tokenizer, dtype), records(probes)
    share = len(every) // world

    def work(rank):
        found, buffers = step(lm, every[rank * share : (rank + 1) * share])
        for value in found.values():  # as DDP does
            distributed.all_reduce(value)
            value /= world
        return found, buffers

    parts = in_ranks(world, work)
    expected, buffers = step(lm, every)
    assert (expected["locality_loss"] > 0) == any(probes)
    for found, own in parts:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            apart = (found[name] - value).norm() / value.norm().clamp(min=1e-6)
            assert apart < tolerance, f"{name} is {apart:.1e} of its norm apart"
        torch.testing.assert_close(own, buffers, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_each_record_is_scored_by_one_process(world):
    data = EditData(test=[])
    data.records["test"] = {"a": records((0, 0, 0)), "b": records((0, 0))}
    every = [r.id for task in data.records["test"].values() for r in task]
    found = []
    for rank in range(world):
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": world})
        batches = list(data.test_dataloader())
        assert batches == [[]] or all(batches)  # every process has a batch, if an empty one
        found += [record.id for batch in batches for record in batch]
    assert sorted(found) == sorted(every)


def test_a_process_without_records_does_not_stop_the_others(tokenizer, tmp_path, monkeypatch):
    """Two records, three processes, as torchrun starts them."""
    recipe = Recipe(architecture="gpt2", width=16, layers=3, heads=2, vocab=600, context=128)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    raw = [
        {"prompt": f"The capital of {c} is", "target_new": "Lyon", "rephrase": f"{c} has the capital"}
        for c in ("Peru", "Mali")
    ]
    (tmp_path / "r.json").write_text(json.dumps(raw))
    monkeypatch.chdir(tmp_path)
    args = [
        "test", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", "--model.lm.name=lm", "--model.editor=Unedited",
        "--data.test=[{name: counterfact, source: r.json}]", "--model.evaluation.fluency_tokens=0",
        "--model.evaluation.generate=false", "--results.show=false",
    ]  # fmt: skip

    def scored(cli):
        table = next(c.table for c in cli.trainer.callbacks if hasattr(c, "table"))
        rows = None if table is None else sorted(table["record"].unique())
        return rows, {k: float(v) for k, v in cli.trainer.callback_metrics.items()}

    port = free_port()

    def work(rank):
        as_torchrun(rank, 3, port)
        return scored(run([*args, "--trainer.strategy=ddp", "--trainer.devices=3"]))

    first, *others = forked(work, 3)
    rows, scores = scored(run(args))
    assert first[0] == rows == ["counterfact/test/0", "counterfact/test/1"]
    assert first[1] == pytest.approx(scores, abs=1e-4) != {}
    assert [found for found, _ in others] == [None, None]
    assert all(found == first[1] for _, found in others)
