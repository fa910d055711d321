"""Editors made, trained and applied over an LM of any precision."""

import torch
from tests.quick import QUICK
from tests.reference import Case, training_batch

from instructedit.editors import build_editor
from instructedit.editors.losses import LossWeights
from instructedit.records import EditRequest

CASES = [
    Case("The capital of France is", "Lyon", locality=(("The people of", "the sea"),)),
    Case("Who", "the man of the sea", wanted=(("And who", "the man of the sea"),), locality=(("The city", "is old"),)),
]
PAIRS = [(case.prompt, case.target) for case in CASES]
REQUESTS = [EditRequest(c.prompt, c.target, task="counterfact", subject=c.prompt.split()[-2:][0]) for c in CASES]


def built(name, lm):
    torch.manual_seed(0)
    return build_editor(name, lm, **QUICK.get(name, {}))


def logits(lm, edit):
    with torch.no_grad(), lm.edited(edit):
        return lm.logits(lm.encode(PAIRS))


def trained(lm, name, steps=3, autocast=False):
    """An editor after some steps, and the losses on the way."""
    editor = built(name, lm).train()
    adam = torch.optim.Adam([p for group in editor.parameter_groups().values() for p in group], lr=1e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = editor.training_loss(training_batch(lm, CASES), LossWeights())["loss"]
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in editor.parameters())
        adam.step()
        adam.zero_grad()
        losses.append(loss.detach())
    return editor, torch.stack(losses)


def saved(lm, folder):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder
