"""What holds on a CPU holds on a GPU: edits, gradients, scores and a step of training."""

import pytest
import torch
from tests.conftest import random_lm

from instructedit.cli import main
from instructedit.editors import build_editor
from instructedit.records import EditRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
REQUESTS = [EditRequest("The capital of France is", "Lyon"), EditRequest("Who", "the man of the sea")]
PAIRS = [(request.prompt, request.target) for request in REQUESTS]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_edit_is_that_of_the_cpu(tokenizer, architecture):
    lm = random_lm(architecture, tokenizer)
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        editor = build_editor("mend", lm.to(device), rank=6, edit_rate=0.05)
        edit = editor.edit(REQUESTS)
        with torch.no_grad():
            found[device] = lm.logits(lm.encode(PAIRS), edit).cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-3)


def test_merging_is_applying(tokenizer):
    lm = random_lm("llama", tokenizer).to("cuda")
    edit = build_editor("mend", lm, rank=6, edit_rate=0.05).edit(REQUESTS[:1])
    batch = lm.encode(PAIRS[:1])
    with torch.no_grad():
        merged = lm.merge(edit)(**batch.inputs).logits[batch.answer_at]
        torch.testing.assert_close(merged, lm.logits(batch, edit), rtol=1e-3, atol=1e-3)


def test_a_fit_takes_steps(tmp_path):
    uri = f"--trainer.logger.init_args.tracking_uri=sqlite:///{tmp_path}/runs.db"
    steps = [
        "--trainer.accelerator=gpu",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
        "--data.val_size=2",
    ]
    assert not main(["fit", "--scale", "tiny", "--editor", "instructedit", uri, *steps])
