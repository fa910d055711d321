"""Training: what moves and what must not, resuming, two processes, and the guards."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from instructedit.editors import base
from instructedit.editors.factored_gradients import factored_matrices
from instructedit.editors.losses import EditingLoss
from instructedit.errors import UserError
from instructedit.lightning_cli import Built, run
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.training import module as training

QUIET = [
    "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--areas.records_per_task=0", "--results.show=false",
    "--model.evaluation.generate=false", "--model.evaluation.fluency_tokens=0",
]  # fmt: skip
EDITOR = ["--model.editor=InstructEdit", "--model.editor.rank=4", "--model.lr=1e-3", "--model.lr_edit_rates=1e-3"]
TRAIN = "[{name: counterfact, size: 30}, {name: convsent, size: 30}]"
TEST = "[{name: counterfact, size: 5}, {name: zsre, size: 4}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A small random LM, as transformers saves it."""
    path = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def options(folder, tmp_path):
    data = [f"--data.train={TRAIN}", f"--data.test={TEST}", "--data.batch_size=4", "--data.val_size=4"]
    return [
        *QUIET,
        *EDITOR,
        *data,
        f"--model.lm.name={folder}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_steps=4",
    ]


def weights(cli):
    return {name: value.clone() for name, value in cli.model.editor.state_dict().items()}


def differing(one, two):
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


def last(folder: Path) -> Path:
    found = sorted(folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert found, "no checkpoint was written"
    return found[-1]


class Watch(L.Callback):
    """What the run starts with, and the mode of the LM within steps; can end the run at a batch."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.modes: set[bool] = set()
        self.start: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer, pl_module):
        self.start = {name: value.clone() for name, value in pl_module.editor.state_dict().items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes.add(pl_module.lm.model.training)
        if batch_idx == self.stop_at:
            raise RuntimeError("killed")


@pytest.fixture
def fitted(options, tmp_path):
    watch = Watch()
    return run(["fit", *options], callbacks=[watch]), watch, tmp_path


def test_a_fit_moves_the_editor_and_nothing_else(fitted, folder):
    cli, watch, root = fitted
    assert cli.trainer.global_step == 4
    moved = differing(watch.start, weights(cli))
    assert {name for name, _ in cli.model.editor.named_parameters()} <= set(moved)
    assert {"log_alpha", "networks.0.norm_u.mean", "networks.0.norm_delta.count"} <= set(moved)
    there = load_file(folder / "model.safetensors")
    own = cli.model.lm.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in there.items())
    assert watch.modes == {False}
    assert not any(p.requires_grad or p.grad is not None for p in cli.model.lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cli.model.lm.model.modules())
    saved = torch.load(last(root), weights_only=True)
    assert saved["state_dict"].keys() == {f"editor.{name}" for name in weights(cli)}
    assert saved["hyper_parameters"]["editor"]["class_path"] == "instructedit.editors.mend.InstructEdit"


def test_the_optimiser_has_a_rate_for_each_sort_of_parameter(options):
    cli = run(["fit", *options, "--model.lr=1e-5", "--model.lr_edit_rates=1e-2", "--trainer.max_steps=1"])
    groups = {group["name"]: group for group in cli.trainer.optimizers[0].param_groups}
    assert [groups["network"]["initial_lr"], groups["edit_rates"]["initial_lr"]] == [1e-5, 1e-2]
    assert [p.shape for p in groups["edit_rates"]["params"]] == [cli.model.editor.log_alpha.shape]
    assert sum(len(group["params"]) for group in groups.values()) == len(list(cli.model.editor.parameters()))


KILLED = {
    "plain": ("--checkpoint.monitor=null", 2),
    "accumulating": ("--checkpoint.monitor=null --trainer.accumulate_grad_batches=2 --model.decay=true", 5),
    "validating": ("--trainer.val_check_interval=2 --trainer.gradient_clip_val=0.5 --model.warmup_steps=2", 3),
}


@pytest.mark.parametrize(("more", "stop_at"), KILLED.values(), ids=KILLED)
def test_a_killed_run_resumes_to_the_very_same_result(options, tmp_path, more, stop_at):
    args = ["fit", *options, *more.split(), "--checkpoint.every_n_train_steps=1"]
    args.append(f"--trainer.default_root_dir={tmp_path}/whole")
    whole = run(args)
    args[-1] = f"--trainer.default_root_dir={tmp_path}/parts"
    with pytest.raises(RuntimeError, match="killed"):
        run(args, callbacks=[Watch(stop_at)])
    checkpoint = last(tmp_path / "parts")
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < step < 4
    resumed = run([*args, f"--ckpt_path={checkpoint}"])
    assert resumed.trainer.global_step == whole.trainer.global_step == 4
    assert differing(weights(whole), weights(resumed)) == []
    optimizers = [cli.trainer.optimizers[0].state_dict()["state"] for cli in (whole, resumed)]
    assert all(torch.equal(optimizers[0][i]["exp_avg"], optimizers[1][i]["exp_avg"]) for i in optimizers[0])
    assert whole.datamodule.state_dict() == resumed.datamodule.state_dict()


def test_checkpoints_by_steps_do_not_wait_for_the_first_validation(options, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(["fit", *options, "--checkpoint.every_n_train_steps=1"], callbacks=[Watch(2)])
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 2


def test_the_last_checkpoint_is_the_last_state_and_the_best_the_best(options, tmp_path, monkeypatch):
    """Also when the score falls from the second validation on."""
    monkeypatch.setattr(
        training.EditingModule, "_log_scores", lambda self, stage: self.log("val/score", -float(self.global_step))
    )
    cli = run(["fit", *options, "--trainer.val_check_interval=1"])
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")}
    assert steps == {"step-1": 1, "last": 4}
    assert Path(cli.trainer.checkpoint_callback.best_model_path).stem == "step-1"


def test_the_same_seed_gives_the_same_editor_and_another_another(options):
    one, two, other = (
        run(["fit", *options, f"--seed_everything={s}", f"--data.seed={s}", "--trainer.max_steps=2"]) for s in (1, 1, 2)
    )
    assert differing(weights(one), weights(two)) == []
    assert differing(weights(one), weights(other))


# -- guards -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(options, monkeypatch, tmp_path):
    def broken(lm, edit, batch, *weights):
        nothing = sum(f.b.sum() for f in edit.factors.values()) * float("nan")
        return EditingLoss(nothing, nothing)

    monkeypatch.setattr(base, "editing_loss", broken)
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(records (counterfact|convsent)/train/"):
        run(["fit", *options, "--checkpoint.every_n_train_steps=1"])
    assert not list(tmp_path.rglob("*.ckpt"))  # the broken weights are not kept


def test_edit_rates_that_stand_still_stop_the_run(options):
    with pytest.raises(UserError, match=r"edit_rates of editor 'instructedit' did not move in 2 steps.*lr_edit_rates"):
        run(["fit", *options, "--model.lr_edit_rates=0", "--guards.patience=2"])


def test_edit_rates_that_move_pass(options):
    assert run(["fit", *options, "--guards.patience=2"]).trainer.global_step == 4


def broken(tokenizer, folder, factor):
    """Options that train on a model whose last norm is multiplied."""
    model = new_model(Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256), 0)
    model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight * factor)
    model.save_pretrained(folder / "broken")
    tokenizer.save_pretrained(folder / "broken")
    return [f"--model.lm.name={folder}/broken"]


def test_a_model_that_gives_no_numbers_is_refused(options, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"its logits are not numbers \(NaN\)"):
        run(["fit", *options, *broken(tokenizer, tmp_path, float("nan"))])


def test_an_absurd_loss_of_the_unedited_model_stops_the_run(options, tokenizer, tmp_path):
    args = ["fit", *options, *broken(tokenizer, tmp_path, 1e3)]
    with pytest.raises(UserError, match=r"the unedited .*broken has a loss of .*guards.max_base_loss"):
        run(args)
    run([*args, "--guards.base_records=0", "--trainer.max_steps=0"])  # the check can be left out


def test_an_editor_without_parameters_has_nothing_to_fit(options):
    rest = [option for option in options if "editor" not in option]
    with pytest.raises(UserError, match="editor 'unedited' has nothing to train"):
        run(["fit", *rest, "--model.editor=Unedited", "--model.lr=1e-3"])


# -- without the command line -------------------------------------------------------------------------------------


def alone(options, tmp_path):
    """What the command line builds, as a script of one's own would hold it; and a Trainer."""
    built = run(["fit", *options], Built)
    assert built.model._data is built.datamodule  # the command line does it by itself
    built.model._data = None
    trainer = L.Trainer(
        max_steps=2, max_epochs=-1, logger=False, accelerator="cpu", enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, default_root_dir=tmp_path,
    )  # fmt: skip
    return built.model, built.datamodule, trainer


def test_the_module_is_connected_with_its_data(options, tmp_path):
    model, data, trainer = alone(options, tmp_path)
    model.connect(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        trainer.fit(model, data)
    assert (trainer.global_step, model.data) == (2, data)


def test_data_that_only_the_trainer_knows_is_still_found(options, tmp_path):
    model, data, trainer = alone(options, tmp_path)
    with pytest.warns(DeprecationWarning, match=r"call module\.connect\(data\)"):
        trainer.fit(model, data)
    assert (trainer.global_step, model.data) == (2, data)


def test_a_module_without_data_says_so(options, tmp_path):
    model, _, trainer = alone(options, tmp_path)
    model.trainer = trainer
    with pytest.raises(UserError, match=r"needs its data: call module\.connect\(data\)"):
        _ = model.data


# -- two processes ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from instructedit.lightning_cli import Built, run
out, *args = sys.argv[1:]
cli = run(args)
cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=None, verbose=False)
scores = {k: float(v) for k, v in cli.trainer.callback_metrics.items() if k.startswith("test/")}
table = next(c.table for c in cli.trainer.callbacks if hasattr(c, "table"))
rows = None if table is None else sorted(table["record"].unique())
found = {"weights": cli.model.editor.state_dict(), "scores": scores, "rows": rows}
torch.save(found, f"{out}-{cli.trainer.global_rank}")
"""


def test_two_processes_make_one_editor_and_the_scores_of_one_process(options, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def process(name, *more):
        more = (*more, "--model.editor.edit_rate=1e-4")  # a larger one makes more of how sums are rounded
        command = [sys.executable, tmp_path / "script.py", tmp_path / name, "fit", *options, *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    process("two", "--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2")
    process("one", "--data.batch_size=4")
    first, second, alone = (torch.load(tmp_path / name, weights_only=True) for name in ("two-0", "two-1", "one-0"))
    assert differing(first["weights"], second["weights"]) == []
    # two batches of two at a time are one of four: the same tokens, the same mean
    torch.testing.assert_close(dict(first["weights"]), dict(alone["weights"]), rtol=1e-3, atol=1e-4)
    assert first["scores"] == second["scores"]
    assert first["scores"] == pytest.approx(alone["scores"], abs=1e-3) != {}
    assert first["rows"] == alone["rows"] != []
    assert second["rows"] is None


FACTORED = [
    "--model.editor.rank=64", "--model.editor.blocks=[-1]", "--data.batch_size=1", "--trainer.gradient_clip_val=0.05",
    "--trainer.accumulate_grad_batches=2",
]  # fmt: skip


def test_gradients_held_as_products_train_the_very_same_editor(options, monkeypatch):
    rows, clip = [], training.ProductAdamW.clip

    def counted(self, max_norm):
        rows.append(sum(len(products) for _, products in factored_matrices(self._parameters())))
        return clip(self, max_norm)

    monkeypatch.setattr(training.ProductAdamW, "clip", counted)
    plain = weights(run(["fit", *options, *FACTORED]))
    assert not rows
    own = weights(run(["fit", *options, *FACTORED, "--model.factored_gradients=true"]))
    assert len(rows) == 4
    assert max(rows) > 0  # the longest conversations give more rows than the matrices have
    for name, expected in plain.items():
        torch.testing.assert_close(own[name], expected, rtol=1e-3, atol=1e-5)


def test_gradients_held_as_products_are_refused_where_they_cannot_be(options, monkeypatch):
    held = [*options, *FACTORED, "--model.factored_gradients=true"]
    with pytest.raises(UserError, match="clip by norm"):
        run(["fit", *held, "--trainer.gradient_clip_algorithm=value"])
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(UserError, match="several processes"):
        run(["fit", *held])
