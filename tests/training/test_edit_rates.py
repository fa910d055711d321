"""``edit_rate: auto`` in a fit: measured on the first training records, logged, and never twice."""

import math

import pytest
import torch
from tests.reference import relative
from tests.training.test_module import QUIET, TEST, TRAIN, last, weights

from instructedit.edits.checksums import CHECKSUM
from instructedit.lightning_cli import run
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.tracking import artifact_path, load_table, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    recipe = Recipe(architecture="llama", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def options(folder, tmp_path):
    return [
        *QUIET, "--model.editor=InstructEdit", "--model.editor.rank=4", "--model.lr=1e-3", f"--data.train={TRAIN}",
        f"--data.test={TEST}", "--data.batch_size=2", "--data.val_size=4", f"--model.lm.name={folder}",
        "--model.c_edit=1", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2", "--edit_rate.records=5",
    ]  # fmt: skip


def sweep_of(cli):
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "EditRateSweep"]
    return callback.tried


def found_by(tried):
    return min(tried[1:], key=lambda found: found.loss).rate


def test_a_fit_starts_where_the_loss_is_least_and_is_that_of_the_same_number(options, tmp_path, caplog):
    with caplog.at_level("INFO"):
        auto = run(["fit", *options])
    tried = sweep_of(auto)
    rate = found_by(tried)
    assert rate not in (tried[1].rate, 1e-4)
    (line,) = [m for m in caplog.messages if m.startswith("edit_rate: ")]
    assert "on 5 training records" in line  # more than a batch of two holds
    assert f"edit_rate: {rate:.2g}, the least outer loss" in line
    by_hand = run(["fit", *options, f"--model.editor.edit_rate={rate!r}", f"--trainer.default_root_dir={tmp_path}/b"])
    assert sweep_of(by_hand) == []
    for name, value in weights(by_hand).items():  # statistics among them: no record is lost or counts twice
        assert relative(weights(auto)[name].double(), value.double()) < 1e-3, name
        assert not name.endswith("count") or value == weights(auto)[name] > 0


def test_what_was_found_is_loaded_and_not_looked_for_again(options, tmp_path):
    first = run(["fit", *options, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}/a"])
    rates = first.model.editor.alpha.detach().clone()
    assert sweep_of(first)
    resumed = run(["fit", *options, f"--ckpt_path={last(tmp_path)}", "--model.lr_edit_rates=0"])
    assert sweep_of(resumed) == []
    assert resumed.trainer.global_step == 2
    assert ((resumed.model.editor.alpha / rates).log().abs() < 0.02).all()
    tested = run(["test", *options, f"--ckpt_path={last(tmp_path / 'a')}"])
    assert torch.equal(tested.model.editor.alpha, rates)


def test_one_step_moves_each_rate_by_its_share(options):
    cli = run(["fit", *options, "--trainer.max_steps=1", "--model.lr_edit_rates=0.05"])
    start = found_by(sweep_of(cli))
    moved = (cli.model.editor.alpha / start).log().abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), atol=1e-3, rtol=0)


def test_decay_draws_no_rate_towards_one(options):
    quiet = ["--model.weight_decay=0.5", "--model.lr_edit_rates=0.5", "--model.lr=0", "--trainer.max_steps=1"]
    cli = run(["fit", *options, *quiet])
    moved = (cli.model.editor.alpha / found_by(sweep_of(cli))).log().abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5), atol=1e-3, rtol=0)  # decay alone would be 2 more


def test_the_sweep_is_a_table_a_figure_and_a_metric(options, tmp_path):
    tracked = [option for option in options if option != "--trainer.logger=false"]
    cli = run(["fit", *tracked, f"--trainer.logger.init_args.root={tmp_path}/store"])
    tried = sweep_of(cli)
    found = runs(root=tmp_path / "store").iloc[0]
    assert found["metrics.edit_rate"] == pytest.approx(found_by(tried))
    table = load_table(found.run_id, "edit_rates", tmp_path / "store")
    assert [*table.columns] == ["rate", "loss", "edit_loss", "locality_loss"]
    assert table["rate"].tolist() == [row.rate for row in tried]
    assert table["loss"].tolist() == [row.loss for row in tried]
    assert artifact_path(found.run_id, "figures/edit_rates.png", tmp_path / "store").is_file()


def test_a_checkpoint_of_an_older_version_is_tested_and_trained_on(options, tmp_path):
    run(["fit", *options, "--trainer.max_steps=1"])
    file = last(tmp_path)
    saved = torch.load(file, weights_only=True)
    rates = saved["state_dict"].pop("editor.log_alpha").exp()
    saved["state_dict"]["editor.alpha"] = -rates
    del saved[CHECKSUM]  # they had none
    torch.save(saved, file)
    tested = run(["test", *options, f"--ckpt_path={file}"])
    torch.testing.assert_close(tested.model.editor.alpha, rates)
    resumed = run(["fit", *options, f"--ckpt_path={file}", "--trainer.max_steps=3"])
    assert sweep_of(resumed) == []
    assert resumed.trainer.global_step == 3
    moved = (resumed.model.editor.alpha / rates).log().abs()
    assert ((moved > 0) & (moved < 2.5 * 1e-2)).all()
    assert all(state["step"] == 2 for state in resumed.trainer.optimizers[0].state.values())  # its state began anew


def test_an_overflow_is_a_rate_that_is_too_high(options, monkeypatch):
    from instructedit.editors import rates

    whole = rates.editing_loss

    def overflowing(lm, edit, *args):
        found = whole(lm, edit, *args)
        size = max(f.b.abs().max().item() for f in edit.factors.values())
        return type(found)(*(term * (math.nan if size > 1e-3 else 1) for term in found))

    monkeypatch.setattr(rates, "editing_loss", overflowing)
    tried = sweep_of(run(["fit", *options, "--trainer.max_steps=1"]))
    assert any(row.loss == math.inf for row in tried)
    assert found_by(tried) < 1e-3
