"""CaliNet: extra feed-forward slots that calibrate facts (Dong et al. 2022)."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.optimisation import Values, optimise, row_losses
from instructedit.editors.options import AUTO, options
from instructedit.editors.scales import layer_scale
from instructedit.edits import SlotEdit, Slots
from instructedit.errors import UserError


def feed_forward_sites(editor: Editor) -> tuple[str, ...]:
    """Returns the names of the feed-forward modules that contain an editor's sites.

    Raises:
        UserError: If the model has no such modules, since the layers' parts belong to the block itself.
    """
    modules = dict.fromkeys(site.mlp for site in editor.sites)
    if bare := [name for name in modules if name.rpartition(".")[2].isdigit()]:
        raise UserError(
            f"editor {editor.name!r} puts slots beside feed-forward layers, and those of {editor.lm.name} are no "
            f"modules of their own (their parts stand in {bare[0]})"
        )
    return tuple(modules)


@options
class SlotEditor(Editor, ABC):
    """Base of methods that add trained slots to a feed-forward layer of the frozen model: FFN(x) + Ṽ act(K̃ x).

    Args:
        slots: Number of slots.
        activation: Activation of the slots: ``gelu``, ``relu`` or ``silu``.
        seed: Seed of the initial keys (the same for all requests; values start at zero).
        blocks: Blocks with slots, negative from the top; None means the paper's, scaled to the model's depth.
    """

    changes_weights = False
    PAPER_BLOCKS = ((11,), 12)

    slots: int = 64
    activation: str = "gelu"
    seed: int = 0
    blocks: Sequence[int] | None = None

    def build(self) -> None:
        self.layers = feed_forward_sites(self)

    def start(self) -> Values:
        """Returns initial keys, of unit length on average, and zero values; name → [slots, hidden]."""
        size = self.lm.applied.sites.width  # feed-forward layers read and write the residual stream
        generator = torch.Generator().manual_seed(self.seed)
        keys = {f"{m}:keys": torch.randn(self.slots, size, generator=generator) * size**-0.5 for m in self.layers}
        return keys | {f"{module}:values": torch.zeros(self.slots, size) for module in self.layers}

    def slot_edit(self, values: Values) -> SlotEdit:
        """Builds the edits with these keys and values, name → [n, slots, hidden]."""

        def slots(module: str) -> Slots:
            keys = values[f"{module}:keys"]
            return Slots(keys, keys.new_zeros(keys.shape[:2]), values[f"{module}:values"])

        return SlotEdit({module: slots(module) for module in self.layers}, self.activation)


@options
class CaliNet(SlotEditor):
    """CaliNet with slots trained for each request separately, as in the other methods' setting (see `CaliNetTrained`).

    Defaults: 64 slots in the last of twelve blocks (CaliNet, T5-base), AdaFactor (InstructEdit, table 4, at 5e-4). The
    number of steps for one request is not published: 100 is our choice. Outputs of feed-forward layers differ by a
    factor of a hundred between models, so the rate is derived from their size by default.

    Args:
        steps: Largest number of gradient steps on a request.
        lr: Learning rate; ``auto``: for keys a share of their size, for values a share of the size of the layer's
            outputs; keys are then initialised as if the layer's inputs had size 1.
        optimizer: ``adam`` or ``adafactor``.
        stop_below: A request is finished when its loss falls below this.
    """

    name: ClassVar[str] = "calinet"
    REMEDY = "a larger lr, or more steps"
    #: The share of the sizes that ``auto`` stands for, chosen on validation records of the embedded models.
    AUTO_LR = 0.02

    steps: int = 100
    lr: float | Literal["auto"] = AUTO
    optimizer: Literal["adam", "adafactor"] = "adafactor"
    stop_below: float = 1e-2

    def compute_edit(self, batch: RequestBatch) -> SlotEdit:
        """Trains slots for each request on its target."""
        return self._tuned(batch, together=False)

    def compute_joint_edit(self, batch: RequestBatch) -> SlotEdit:
        """Trains one set of slots on the mean loss of all requests."""
        return self._tuned(batch, together=True)

    def _tuned(self, batch: RequestBatch, together: bool) -> SlotEdit:
        count = 1 if together else len(batch)
        one, lr = self._scaled(self.start()) if self.lr == AUTO else (self.start(), self.lr)
        start = {name: tensor.to(self.lm.device).expand(count, *tensor.shape) for name, tensor in one.items()}
        losses = row_losses(self.lm.losses, batch.tokens, self.slot_edit, together)
        return self.slot_edit(optimise(start, losses, self.steps, lr, self.optimizer, stop_below=self.stop_below))

    def _scaled(self, start: Values) -> tuple[Values, dict[str, float]]:
        """Returns initial keys and values and their learning rates, scaled to each layer."""
        start, rates = dict(start), {}
        for module in self.layers:
            scale, keys, values = layer_scale(self.lm, module), f"{module}:keys", f"{module}:values"
            start[keys] = start[keys] / scale.inputs
            rates[keys] = self.AUTO_LR * start[keys].shape[-1] ** -0.5 / scale.inputs
            rates[values] = self.AUTO_LR * scale.outputs
        return start, rates


@options
class CaliNetTrained(SlotEditor):
    """CaliNet as trained in its paper: `fit` trains one set of slots on a dataset, the same for every request.

    Defaults: 64 slots in the last of twelve blocks (CaliNet, T5-base).
    """

    name: ClassVar[str] = "calinet_trained"
    trainable = True

    def build(self) -> None:
        super().build()
        # Parameter names must not contain dots.
        self.weights = nn.ParameterDict({k.replace(".", "/"): nn.Parameter(v) for k, v in self.start().items()})

    def compute_edit(self, batch: RequestBatch) -> SlotEdit:
        """Returns the same slots for every request."""
        return self.slot_edit({k.replace("/", "."): v.expand(len(batch), *v.shape) for k, v in self.weights.items()})

    def compute_joint_edit(self, batch: RequestBatch) -> SlotEdit:
        return self.compute_edit(batch)[0]
