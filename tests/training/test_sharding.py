"""A language model sharded over processes, the editor whole in each: the same numbers as in one process."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import random_lm
from tests.editors.test_promises import built
from tests.ranks import as_torchrun, forked, free_port, in_ranks
from tests.training.test_ranks import records, step
from torch import distributed

import instructedit as ie
from instructedit import processes
from instructedit.editors import editor_names
from instructedit.evaluation import Evaluation, evaluate_batch
from instructedit.lightning_cli import run
from instructedit.testbed.pretrain import Recipe, new_model

#: Processes, and how many of them share a copy of the LM.
WORLDS = [(2, 2), (4, 2)]


def held(lm):
    """Weights of the blocks that this process keeps between passes."""
    return sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in lm.forward.blocks.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(("world", "shards"), WORLDS)
def test_a_step_and_its_scores_are_those_of_one_process(tokenizer, world, shards, architecture):
    lm, every = random_lm(architecture, tokenizer), records((2, 1, 0, 1))
    rows = Evaluation(generate=True, fluency_tokens=0)

    def scored(lm, of):
        torch.manual_seed(1)
        editor = ie.build_editor("mend", lm, rank=4, edit_rate=0.1)
        found = processes.from_all(evaluate_batch(lm, editor, of, rows).rows)
        return sorted(
            (row["record"], row["kind"], row["prompt"], row.get("after") or "", row["log_likelihood"]) for row in found
        )

    def work(rank):
        whole = held(lm)
        lm.shard(shards, "cpu")
        number, count = processes.place_among(rank, world)
        share = len(every) // count
        own = every[number * share : (number + 1) * share]
        found, buffers = step(lm, own)
        for value in found.values():  # as DDP does
            distributed.all_reduce(value)
            value /= world
        scores = scored(lm, own)
        return found, buffers, scores, held(lm) / whole

    parts = in_ranks(world, work)
    expected, buffers = step(lm, every)
    scores = scored(lm, every)
    for found, own, seen, part in parts:
        assert part == pytest.approx(1 / shards, abs=0.01)
        for name, value in expected.items():
            apart = (found[name] - value).norm() / value.norm().clamp(min=1e-6)
            assert apart < 1e-5, f"{name} is {apart:.1e} of its norm apart"
        torch.testing.assert_close(own, buffers, rtol=1e-5, atol=1e-6)
        assert [row[:4] for row in seen] == [row[:4] for row in scores]
        assert [row[4] for row in seen] == pytest.approx([row[4] for row in scores], abs=1e-4)


def test_every_editor_edits_a_sharded_model_as_a_whole_one(tokenizer):
    request = ie.EditRequest("The capital of France is", "Rome", subject="France", task="counterfact")

    def words(lm):
        found = {}
        for name in editor_names():
            torch.manual_seed(0)
            with lm.edited(built(name, lm).edit([request])):
                found[name] = lm.generate(request.prompt, 4)
        return found

    def work(rank):
        return words(random_lm("gpt2", tokenizer).shard(2, "cpu"))

    whole = words(random_lm("gpt2", tokenizer))
    assert len(set(whole.values())) > 3
    assert in_ranks(2, work) == [whole, whole]


@pytest.mark.parametrize("editor", ["Mend", "RidgeEdit"])
def test_fit_and_test_by_the_command_line(tokenizer, tmp_path, monkeypatch, editor):
    recipe = Recipe(architecture="llama", width=32, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    tasks = "[{name: counterfact, size: 4}, {name: zsre, size: 3}]"
    common = [
        *quiet, "--model.lm.name=lm", f"--model.editor={editor}", "--model.editor.rank=4", "--model.lr=1e-3",
        f"--data.train={tasks}", f"--data.test={tasks}", "--data.val_size=2", "--guards.base_records=0",
        "--model.evaluation.fluency_tokens=0", "--results.show=false",
    ]  # fmt: skip
    rate = [] if editor == "RidgeEdit" else ["--model.editor.edit_rate=1e-2"]

    def both(*more):
        """Trains, tests what was trained; gives the editor's weights and the scores."""
        fitted = run(["fit", *common, *rate, "--trainer.max_steps=3", "--trainer.val_check_interval=3", *more])
        weights = {name: value.clone() for name, value in fitted.model.editor.state_dict().items()}
        tested = run(["test", *common, *rate, "--ckpt_path=latest", *more])
        table = next(c.table for c in tested.trainer.callbacks if hasattr(c, "table"))
        metrics = {k: float(v) for k, v in tested.trainer.callback_metrics.items()}
        return weights, metrics, None if table is None else sorted(table["record"])

    port = free_port()

    def work(rank):
        as_torchrun(rank, 2, port)
        return both(
            "--trainer.strategy=ddp", "--trainer.devices=2", "--model.lm.shards=2", "--data.batch_size=4",
            "--trainer.logger.init_args.root=two",
        )  # fmt: skip

    (weights, metrics, rows), (others, _, none) = forked(work, 2)
    expected, scores, table = both("--data.batch_size=4", "--trainer.logger.init_args.root=one")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(weights[name], others[name]), f"the two processes have another {name}"
    assert metrics == pytest.approx(scores, abs=0.5) != {}
    assert rows == table
    assert none is None


def test_a_process_alone_is_nobodys_copy(monkeypatch):
    """Even where it was one of several that shared a model before."""
    monkeypatch.setattr(processes, "_copies", 2)
    assert processes.place_among(0, 1) == (0, 1)
    assert processes.mean_over_processes(torch.tensor(3.0)) == 3


def refusal(lm):
    with pytest.raises(ie.UserError) as error:
        lm.shard(2, "cpu")
    return str(error.value).rpartition(":")[0]


def test_what_cannot_be_shared_out_is_said(tokenizer, tmp_path):
    with pytest.raises(ie.UserError, match=r"shards is 2, and there are 1 processes: start a multiple"):
        random_lm("gpt2", tokenizer).shard(2, "cpu")
    lm = random_lm("gpt2", tokenizer)
    kept = ie.FrozenLM(lm.model, tokenizer, cache_dir=tmp_path)
    assert in_ranks(2, lambda rank: refusal(kept)) == ["lm: shards and cache_dir do not go together"] * 2
