"""Detection of the linear layers of a block's feed-forward layer, from a forward pass of a short text.

A feed-forward layer processes each position alone, whereas attention, convolutions and recurrences mix positions; and
it widens the residual stream and narrows it again. So a linear layer belongs to one if

1. no part of the block that holds it mixes positions (by autograd: the last output depends on the last input alone);
2. it maps the residual stream's width to something at least as wide, or back; and
3. a layer of the opposite direction stands beside it, in the same module or the smallest one that holds both.

Matrices of that size that are not linear layers, and linear layers that see only some of the positions, are experts
that a router chooses among.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

#: Tokens of the text, chosen arbitrarily.
TOKENS = (3, 1, 4, 1, 5, 9, 2, 6)


class Run(NamedTuple):
    """Inputs and output of a module in one forward call.

    Attributes:
        inputs: The states that entered it, then any other input tensor that depends on the text.
        output: The states that left it.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor


class FeedForward(NamedTuple):
    """The feed-forward layers of a block, and its routed experts.

    Attributes:
        layers: Name of each linear layer, in the order in which they run → name of the module that holds it with the
            rest of its feed-forward layer.
        routed: Names of the modules that hold routed experts (those that a router chooses among).
    """

    layers: dict[str, str]
    routed: tuple[str, ...]


Runs = Mapping[str, list[Run]]


def feed_forward(block: nn.Module, name: str, runs: Runs) -> FeedForward:
    """Finds the feed-forward layers of a block.

    Args:
        block: The block.
        name: Its module name.
        runs: Recorded runs of the modules in it, by name (see `recorded_runs`).
    """
    width = runs[name][0].inputs[0].shape[-1]
    alone = dict(_positionwise_parts(block, name, runs))
    layers = [part for part in runs if part in alone and _widens(alone[part], width)]
    routed = [part for part, module in alone.items() if _holds_matrices(module, width)]
    routed += [part for part in layers if _rows(runs[part][0].inputs[0]) < len(TOKENS)]
    return FeedForward(_homes(layers, alone, name, width), tuple(routed))


def _positionwise_parts(block: nn.Module, name: str, runs: Runs) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of every part that neither mixes positions nor lies within a part that does."""
    for child, module in block.named_children():
        part = f"{name}.{child}"
        leaf = not any(True for _ in module.children())
        if part in runs and not leaf and _mixes(*runs[part][0]):
            continue
        yield part, module
        yield from _positionwise_parts(module, part, runs)


def _mixes(inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """True if the output at the last position depends on the inputs at other positions."""
    if not output.requires_grad:
        return False
    last = _by_position(output)[-1].float()
    weights = torch.arange(1.0, len(last) + 1, device=last.device)  # after a layer norm a plain sum is constant
    grads = torch.autograd.grad((last * weights).sum(), inputs, retain_graph=True, allow_unused=True)
    keys = [states is not inputs[0] and states.ndim > 3 for states in inputs]  # keys or values of other blocks
    parts = [
        grad if key else _by_position(grad)[:-1] for grad, key in zip(grads, keys, strict=True) if grad is not None
    ]
    return any(bool(part.any()) for part in parts)


def _by_position(states: Tensor) -> Tensor:
    """Reshapes the states of the only row, whatever their shape, to [positions, …]."""
    return states.reshape(_rows(states), -1)


def _rows(states: Tensor) -> int:
    return states.shape[0] if states.ndim == 2 else states.shape[1]


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Returns (in, out) of a linear layer, or None for any other module."""
    if isinstance(layer, Conv1D):
        rows, columns = layer.weight.shape
        return int(rows), int(columns)
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None


def _widens(layer: nn.Module, width: int) -> bool:
    shape = linear_shape(layer)
    return shape is not None and width in shape and min(shape) >= width


def _holds_matrices(module: nn.Module, width: int) -> bool:
    """True if a module is no linear layer but has parameters as large as a feed-forward matrix."""
    own = module.parameters(recurse=False)
    return linear_shape(module) is None and any(p.ndim > 1 and p.numel() >= width * width for p in own)


def _homes(layers: Iterable[str], modules: Mapping[str, nn.Module], block: str, width: int) -> dict[str, str]:
    """Finds for each layer the smallest module that holds a layer from the residual stream and one back to it."""
    homes = {layer: layer.rpartition(".")[0] for layer in layers}
    while True:
        together = defaultdict(list)
        for layer, home in homes.items():
            together[home].append(linear_shape(modules[layer]))
        bare = [home for home, shapes in together.items() if not _whole(shapes, width)]
        if not bare:
            return homes
        homes = {
            layer: home.rpartition(".")[0] if home in bare else home
            for layer, home in homes.items()
            if home not in bare or home != block
        }


def _whole(shapes: list[tuple[int, int] | None], width: int) -> bool:
    first, last = [s for s in shapes if s and s[0] == width], [s for s in shapes if s and s[1] == width]
    return bool(first and last) and len(shapes) > 1


def _tensors(given: Any) -> Iterator[Tensor]:
    """Yields the tensors among a module's arguments that depend on the text."""
    if isinstance(given, Tensor):
        if given.requires_grad:
            yield given
    elif isinstance(given, Mapping):
        yield from _tensors(list(given.values()))
    elif isinstance(given, list | tuple):
        for part in given:
            yield from _tensors(part)


@contextmanager
def recorded_runs(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[Runs]:
    """Runs a short text through the model and yields the runs of the given modules, in the order in which they end."""
    runs: dict[str, list[Run]] = defaultdict(list)

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            inputs = tuple(_tensors([*args, *kwargs.values()]))
            states = output[0] if isinstance(output, tuple | list) and output else output
            if inputs and isinstance(states, Tensor):
                runs[name].append(Run(inputs, states))
            return output.clone() if isinstance(output, Tensor) else output  # keeps in-place changes off the record

        return hook

    def differentiable(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # a model may change it in place

    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        ids = torch.tensor([TOKENS], device=model.device)
        stack.callback(model.get_input_embeddings().register_forward_hook(differentiable).remove)
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(keep(name), with_kwargs=True).remove)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        yield runs
