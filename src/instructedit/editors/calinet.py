"""CaliNet: extra feed-forward slots that calibrate facts (Dong et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.descent import Values, descend
from instructedit.edits import SlotEdit, Slots
from instructedit.errors import UserError


def feed_forward_sites(editor: Editor) -> tuple[str, ...]:
    """Modules of the whole feed-forward layers that hold an editor's sites.

    Raises:
        UserError: If the model keeps their parts in the block itself, so that there is nothing to put slots beside.
    """
    modules = dict.fromkeys(site.mlp for site in editor.sites)
    if bare := [name for name in modules if name.rpartition(".")[2].isdigit()]:
        raise UserError(
            f"editor {editor.name!r} puts slots beside feed-forward layers, and those of {editor.lm.name} are no "
            f"modules of their own (their parts stand in {bare[0]})"
        )
    return tuple(modules)


class CaliNet(Editor):
    """Extra slots beside a feed-forward layer: FFN(x) + Ṽ act(K̃ x), trained while the model is frozen.

    These slots are trained for each request alone, the model's other methods' setting; `CaliNetTrained` has one set of
    slots for a whole dataset, as the paper has.

    Defaults: 64 slots in the last block but one of twelve (CaliNet, T5-base), AdaFactor at 5e-4 (InstructEdit, table
    4). How many steps one request takes is published nowhere: 100 is our choice.

    Args:
        slots: How many.
        steps: Gradient steps on a request, at most.
        lr: Their learning rate.
        optimizer: ``adam`` or ``adafactor``.
        activation: Of the slots: ``gelu``, ``relu`` or ``silu``.
        stop_below: A request is done when its loss is below this.
        seed: Of the keys at the start (the same for all requests; values start at zero).
        instructions: Put the task's instruction in front of every request.
        blocks: Blocks with slots, negative from the top; None means as far up as in the paper.
        site_names: Names or patterns of layers in the feed-forward layers that get slots; None means all.
    """

    name: ClassVar[str] = "calinet"
    PAPER_BLOCKS = ((11,), 12)

    def __init__(
        self,
        slots: int = 64,
        steps: int = 100,
        lr: float = 5e-4,
        optimizer: Literal["adam", "adafactor"] = "adafactor",
        activation: str = "gelu",
        stop_below: float = 1e-2,
        seed: int = 0,
        instructions: bool = False,
        blocks: Sequence[int] | None = None,
        site_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(instructions, blocks, site_names)
        self.slots, self.steps, self.lr, self.optimizer = slots, steps, lr, optimizer
        self.activation, self.stop_below, self.seed = activation, stop_below, seed

    def build(self) -> None:
        self.layers = feed_forward_sites(self)

    def make(self, batch: RequestBatch) -> SlotEdit:
        """Slots for each request, trained on its target."""

        def losses(values: Values, active: Tensor) -> Tensor:
            return self.lm.losses(batch.tokens.select(active), self._edit(values), None, self.sites[0].block)

        return self._edit(self._descend(len(batch), losses))

    def make_together(self, batch: RequestBatch) -> SlotEdit:
        """One set of slots, trained on the mean loss of all requests."""

        def losses(values: Values, active: Tensor) -> Tensor:
            return self.lm.losses(batch.tokens, self._edit(values), None, self.sites[0].block).mean(0, keepdim=True)

        return self._edit(self._descend(1, losses))

    def _descend(self, count: int, losses: Callable[[Values, Tensor], Tensor]) -> Values:
        start = {name: tensor.to(self.lm.device).expand(count, *tensor.shape) for name, tensor in self._start().items()}
        return descend(start, losses, self.steps, self.lr, self.optimizer, stop_below=self.stop_below)

    def _start(self) -> Values:
        """Keys of unit length on average, values that say nothing yet."""
        generator, size = torch.Generator().manual_seed(self.seed), _width(self)
        keys = {f"{m}:keys": torch.randn(self.slots, size, generator=generator) * size**-0.5 for m in self.layers}
        return keys | {f"{module}:values": torch.zeros(self.slots, size) for module in self.layers}

    def _edit(self, values: Values) -> SlotEdit:
        def slots(module: str) -> Slots:
            keys = values[f"{module}:keys"]
            return Slots(keys, keys.new_zeros(keys.shape[:2]), values[f"{module}:values"])

        return SlotEdit({module: slots(module) for module in self.layers}, self.activation)


def _width(editor: Editor) -> int:
    """Of the residual stream, which feed-forward layers read and write."""
    return next(site.out_features for site in editor.lm.sites if site.output)


class CaliNetTrained(CaliNet):
    """CaliNet as its paper trains it: one set of slots for a dataset, by `fit`, the same for every request.

    Defaults: as for `CaliNet`.

    Args:
        slots: How many.
        activation: Of the slots: ``gelu``, ``relu`` or ``silu``.
        seed: Of the keys at the start (values start at zero).
        instructions: Put the task's instruction in front of every request.
        blocks: Blocks with slots, negative from the top; None means as far up as in the paper.
        site_names: Names or patterns of layers in the feed-forward layers that get slots; None means all.
    """

    name: ClassVar[str] = "calinet_trained"
    trainable = True

    def __init__(
        self,
        slots: int = 64,
        activation: str = "gelu",
        seed: int = 0,
        instructions: bool = False,
        blocks: Sequence[int] | None = None,
        site_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            slots, activation=activation, seed=seed, instructions=instructions, blocks=blocks, site_names=site_names
        )

    def build(self) -> None:
        super().build()
        # Parameter names may hold no dots.
        self.weights = nn.ParameterDict({k.replace(".", "/"): nn.Parameter(v) for k, v in self._start().items()})

    def make(self, batch: RequestBatch) -> SlotEdit:
        """The same slots for every request."""
        values = {k.replace("/", "."): v.expand(len(batch), *v.shape) for k, v in self.weights.items()}
        return self._edit(values)

    def make_together(self, batch: RequestBatch) -> SlotEdit:
        return self.make(batch)[0]
