"""GRACE: a codebook of cached values beside one layer (Hartvigsen et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.optimisation import Values, optimise
from instructedit.editors.options import AUTO, options
from instructedit.editors.scales import layer_scale
from instructedit.edits import CodebookEdit
from instructedit.errors import UserError
from instructedit.lm import IGNORE


@options
class Grace(Editor):
    """Replaces one layer's output where its input lies within ε of a key that an edit left.

    Key: what the layer sees at the last token of the prompt. Value: trained so that the layer giving it there makes
    the model say the target. Each position of a row is looked up on its own, where the original looks at the last
    prompt token alone: the model needs not be told where a prompt ends, and is scored as every other method's is.

    Block 35 of GPT2-XL's 48, its MLP's first layer, 100 steps of Adam, as Hartvigsen et al., who have ε = 1, a rate
    of 1 and a cold start. What layers see and give differs by a factor of ten and more between models, so the defaults
    are derived from the model.

    Args:
        radius: ε of a new key, in the layer's input space; ``auto``: a share of how far apart unrelated prompts are.
        steps: Gradient steps on a value.
        lr: Their learning rate; ``auto``: a share of the size of what the layer gives.
        init: Where a value starts: ``warm``, what the unedited layer gives, or ``cold``, uniform in 0..1 as in the
            original (the same draw for all requests).
        stop_below: A request is done when its loss is below this.
        seed: Of the cold start.
        blocks: The block, negative from the top; None means as far up as in the paper.
    """

    name: ClassVar[str] = "grace"
    changes_weights = False
    PAPER_BLOCKS = ((35,), 48)
    REMEDY = "a larger lr, or more steps"
    #: What ``auto`` is as a share of the model's scales. Of 40 validation records of the embedded CounterFact, tiny and
    #: tiny-llama then score 98 and 99 in Reliability, 50 and 54 in Generalization, 96 and 89 in Locality; on the first
    #: eight of them a radius of 0.5 in place of 0.3 raises Generalization (from 42 to 69 and 94) and lowers Locality
    #: (from 92 and 90 to 82 and 79).
    AUTO_RADIUS, AUTO_LR = 0.3, 0.3

    radius: float | Literal["auto"] = AUTO
    steps: int = 100
    lr: float | Literal["auto"] = AUTO
    init: Literal["cold", "warm"] = "warm"
    stop_below: float = 0.0
    seed: int = 0
    blocks: Sequence[int] | None = None

    def build(self) -> None:
        """Keeps one layer: the first of those chosen."""
        if self.site_names is not None and len(self.sites) != 1:
            raise UserError(f"editor 'grace' edits one layer, got {', '.join(s.name for s in self.sites)}")
        self.sites = self.sites[:1]

    def compute_edit(self, batch: RequestBatch) -> CodebookEdit:
        """One codebook of one entry for each request."""
        site, count = self.sites[0], len(batch)
        seen = self.lm.record_activations(batch.tokens.prompts(), [site.name])[site.name]
        last = (batch.tokens.labels != IGNORE).long().argmax(-1)
        where = torch.arange(count), last
        keys, starts = seen.inputs[where].float(), seen.outputs[where].float()
        if self.init == "cold":
            drawn = torch.rand(site.out_features, generator=torch.Generator().manual_seed(self.seed))
            starts = drawn.to(starts.device).expand_as(starts)
        targets = [row[row != IGNORE] for row in batch.tokens.labels]
        labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1).to(keys.device)
        scale = layer_scale(self.lm, site.name)
        radii = keys.new_full((count, 1), self.AUTO_RADIUS * scale.distance if self.radius == AUTO else self.radius)
        lr = self.AUTO_LR * scale.outputs if self.lr == AUTO else self.lr

        def book(values: Tensor, active: Tensor) -> CodebookEdit:
            return CodebookEdit(
                site.name, keys[active].unsqueeze(1), values.unsqueeze(1), radii[active], labels[active].unsqueeze(1)
            )

        def losses(values: Values, active: Tensor) -> Tensor:
            return self.lm.losses(batch.tokens.select(active), book(values["value"], active), None, site.block)

        found = optimise({"value": starts}, losses, self.steps, lr, stop_below=self.stop_below)
        return book(found["value"], torch.arange(count, device=keys.device))
