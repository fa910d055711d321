"""Edit sites: the linear layers of the MLPs, found from the module tree and never from the model's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from instructedit.errors import UserError


@dataclass(frozen=True)
class Site:
    """One linear layer that can be edited.

    Attributes:
        name: Its module name in the model.
        block: Number of its block, from 0.
        in_features, out_features: The shape of the map; edits are [out, in] whatever the storage is.
        transposed: Whether the weight is stored as [in, out] (GPT-2's Conv1D).
        output: Whether it writes into the residual stream (a "down" projection).
        mlp: Name of the module that holds it with the rest of its feed-forward layer; the block itself where there is
            no such module (OPT).
    """

    name: str
    block: int
    in_features: int
    out_features: int
    transposed: bool
    output: bool
    mlp: str

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out); sites of one shape share a hypernetwork."""
        return self.in_features, self.out_features


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        rows, columns = layer.weight.shape
        return int(rows), int(columns)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The transformer blocks: the longest list of modules of one class, and its name.

    Raises:
        UserError: If the model has no such list.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of transformer blocks found, so there are no edit sites")
    return max(lists, key=lambda pair: len(pair[1]))


def _is_activation(module: nn.Module) -> bool:
    leaf = not any(True for _ in module.children())
    return leaf and not any(True for _ in module.parameters()) and not isinstance(module, nn.Dropout | nn.Identity)


def _mlp_layers(block: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name and module of each MLP layer, and whether it is its MLP's last.

    An MLP is what holds two or more linear layers and an activation side by side; attention holds none.
    """
    for name, module in block.named_modules():
        children = dict(module.named_children())
        linear = {n: m for n, m in children.items() if isinstance(m, nn.Linear | Conv1D)}
        if len(linear) >= 2 and any(_is_activation(m) for m in children.values()):
            for child, layer in linear.items():
                yield (f"{name}.{child}" if name else child), layer, child == list(linear)[-1]


def find_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every MLP layer of every block, from the bottom up.

    Raises:
        UserError: If the model has none.
    """
    prefix, blocks = find_blocks(model)
    hidden = model.config.get_text_config().hidden_size
    sites = []
    for number, block in enumerate(blocks):
        for name, layer, last in _mlp_layers(block):
            inside, outside = _features(layer)
            full = f"{prefix}.{number}.{name}"
            output = last and outside == hidden
            mlp = full.rpartition(".")[0]
            sites.append(Site(full, number, inside, outside, isinstance(layer, Conv1D), output, mlp))
    if not sites:
        raise UserError(f"{type(model).__name__}: no MLP with linear layers found in its blocks, so no edit sites")
    return tuple(sites)


def find_linear_layers(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every linear layer of every block, attention's among them, from the bottom up: what an adapter may change."""
    prefix, blocks = find_blocks(model)
    hidden = model.config.get_text_config().hidden_size
    sites = []
    for number, block in enumerate(blocks):
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear | Conv1D):
                full = f"{prefix}.{number}.{name}"
                inside, outside = _features(layer)
                transposed, output = isinstance(layer, Conv1D), outside == hidden
                sites.append(Site(full, number, inside, outside, transposed, output, full.rpartition(".")[0]))
    return tuple(sites)


def select_sites(
    sites: Sequence[Site], names: Sequence[str] | None = None, blocks: Sequence[int] | None = None
) -> tuple[Site, ...]:
    """The sites that match.

    Args:
        sites: All sites of a model.
        names: Module names or patterns such as ``*.mlp.c_proj``; None means any.
        blocks: Block numbers, negative from the top; None means any.

    Raises:
        UserError: If a name or a block matches nothing.
    """
    count = max(s.block for s in sites) + 1
    for block in blocks or ():
        if not -count <= block < count:
            raise UserError(f"block {block}: the model has {count} blocks with edit sites")
    wanted = None if blocks is None else {b % count for b in blocks}
    chosen = [s for s in sites if wanted is None or s.block in wanted]
    for name in names or ():
        if not any(fnmatch(s.name, name) for s in chosen):
            shown = ", ".join(s.name for s in (chosen or sites)[-6:])
            raise UserError(f"no edit site is called {name!r}; the model's are like: {shown}")
    return tuple(s for s in chosen if names is None or any(fnmatch(s.name, n) for n in names))


def dense_weight(layer: nn.Module, site: Site) -> nn.Parameter:
    """The layer's weight, as floats: [in, out] where the site is `transposed`, else [out, in].

    Raises:
        UserError: If it is stored packed (8 or 4 bits).
    """
    weight = layer.get_parameter("weight")
    if not weight.is_floating_point() or weight.shape != (site.shape if site.transposed else site.shape[::-1]):
        raise UserError(
            f"{site.name}: its weight is stored in 8 bits or fewer, which cannot take a change; "
            "load the model without quantize (dtype bfloat16 or float32) and merge the edit into that"
        )
    return weight


def add_to_weight(layer: nn.Module, site: Site, delta: Tensor) -> None:
    """Adds a dense change [out, in] to the layer's weight, in place (a packed weight is refused: `dense_weight`)."""
    weight = dense_weight(layer, site)
    weight.data += (delta.T if site.transposed else delta).to(weight)
