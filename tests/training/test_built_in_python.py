"""A module and its data that a script builds: their checkpoints hold plain values, and are read back as any other."""

import lightning as L  # noqa: N812
import pytest
import torch

import instructedit as ie
from instructedit.data.module import EditData, TaskSource
from instructedit.editors import Editor
from instructedit.editors.mend import InstructEdit
from instructedit.editors.scope_edit import ScopeEdit
from instructedit.training.module import EditingModule, LMConfig


def built(editor: Editor | None = None) -> tuple[EditingModule, EditData]:
    tasks = [TaskSource("counterfact", size=4)]
    data = EditData(train=tasks, val=tasks, test=[TaskSource("zsre", size=2)], batch_size=2)
    evaluation = ie.Evaluation(generate=False, fluency_tokens=0)
    module = EditingModule(editor or InstructEdit(rank=4), LMConfig(name="tiny"), evaluation=evaluation)
    module.connect(data)
    return module, data


def trainer(steps: int) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=1, accelerator="cpu",
        inference_mode=False, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_a_script_is_resumed_tested_and_loaded(tmp_path):
    module, data = built()
    first = trainer(1)
    first.fit(module, data)
    file = tmp_path / "a.ckpt"
    first.save_checkpoint(file)
    saved = torch.load(file, weights_only=True)  # refuses objects
    assert saved["hyper_parameters"]["editor"]["init_args"]["rank"] == 4
    assert saved["hyper_parameters"]["lm"]["name"] == "tiny"
    assert saved["datamodule_hyper_parameters"]["train"][0]["size"] == 4

    module, data = built()
    second = trainer(2)
    second.fit(module, data, ckpt_path=file)
    assert second.global_step == 2
    module, data = built()
    assert trainer(1).test(module, data, ckpt_path=file, verbose=False)[0]
    loaded = ie.load_editor(file, module.lm)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in first.model.editor.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_what_training_keeps_beside_weights_is_in_its_checkpoints(tmp_path):
    def scoped() -> ScopeEdit:
        return ScopeEdit(text="tiny", tokens=2000, rank=4, edit_rate=0.1, embedding=4, token_embedding=4)

    module, data = built(scoped())
    first = trainer(1)
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again, data = built(scoped())
    trainer(1).test(again, data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    (known,), (found,) = module.editor.matcher.known, again.editor.matcher.known
    assert found.wordings == known.wordings
    assert all(torch.equal(*pair) for pair in zip(found[1:], known[1:], strict=True))
