"""Edit sites: the linear layers of the blocks, found in the model itself and never by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from instructedit.errors import UserError
from instructedit.lm.feed_forward import TOKENS, Run, feed_forward, linear_shape, recorded_runs


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
        """Shape of the map, (in, out); sites of one shape share a hypernetwork."""
        return self.in_features, self.out_features


@dataclass(frozen=True)
class Layout:
    """The edit sites of a model, and its routed experts, which cannot be edited.

    Attributes:
        sites: The feed-forward matrices of its blocks, from the bottom up.
        routed: Number of each block whose feed-forward layer holds routed experts → name of the module that does.
        width: Width of the residual stream.
    """

    sites: tuple[Site, ...]
    routed: Mapping[int, str]
    width: int


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Finds the transformer blocks of the language tower, and their name: the module list nearest to the embedding.

    A vision or audio tower has blocks of its own, which lie further from the embedding of the tokens.

    Raises:
        UserError: If the model has no such list, or several that are equally near.
    """
    kind = type(model).__name__
    names = {module: name for name, module in model.named_modules()}
    name = names.get(_token_embedding(model), "")
    while True:
        lists = [(f"{name}.{part}".lstrip("."), m) for part, m in _lists(model.get_submodule(name))]
        if lists or not name:
            break
        name = name.rpartition(".")[0]
    if not lists:
        raise UserError(f"{kind}: no list of transformer blocks found, so there are no edit sites")
    if len(lists) > 1:
        found = ", ".join(name for name, _ in lists)
        raise UserError(f"{kind}: its layers are no list of blocks but stand in {found}; it cannot be edited")
    return lists[0]


def _token_embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _lists(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Finds the least deeply nested lists of modules that have submodules of their own."""
    found = [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and all(any(True for _ in m.children()) for m in part)
    ]
    least = min((name.count(".") for name, _ in found), default=0)
    return [(name, part) for name, part in found if name.count(".") == least]


def find_layout(model: PreTrainedModel) -> Layout:
    """Finds the feed-forward matrices of every block (see `feed_forward`), and the blocks whose experts are routed.

    Raises:
        UserError: If the model has none, or it is not made of blocks that run one after the other.
    """
    prefix, blocks = find_blocks(model)
    sites: list[Site] = []
    routed: dict[int, str] = {}
    named = {f"{prefix}.{i}": block for i, block in enumerate(blocks)}
    parts = {f"{name}.{part}".rstrip("."): m for name, block in named.items() for part, m in block.named_modules()}
    with recorded_runs(model, parts) as runs:
        width = check_blocks(model, [runs[name] for name in named])
        for number, (name, block) in enumerate(named.items()):
            layers, experts = feed_forward(block, name, runs)
            if experts:
                routed[number] = experts[0]
                continue
            lasts = {home: layer for layer, home in layers.items()}
            sites += [_site(n, number, parts[n], n == lasts[home], home) for n, home in layers.items()]
    if not sites and not routed:
        raise UserError(
            f"{type(model).__name__}: its blocks have no feed-forward layer of their own; it cannot be edited"
        )
    return Layout(tuple(sites), routed, width)


def check_blocks(model: PreTrainedModel, runs: Sequence[Sequence[Run]]) -> int:
    """Returns the residual stream's width; checks that each block runs once, on one finite state for each token.

    Args:
        model: The model.
        runs: Recorded runs of each block.

    Raises:
        UserError: If they do not.
    """
    kind, times = type(model).__name__, [len(run) for run in runs]
    if set(times) != {1}:
        raise UserError(f"{kind}: text runs its blocks {times} times, not once each; it cannot be edited")
    shape = list(runs[0][0].inputs[0].shape)
    if shape[:-1] != [1, len(TOKENS)]:
        raise UserError(
            f"{kind}: its blocks see states of the shape {shape} for {len(TOKENS)} tokens, not one state for each; "
            "it cannot be edited"
        )
    if not all(run[0].output.isfinite().all() for run in runs):
        raise UserError(f"{kind}: its hidden states are not numbers (NaN or infinite); are its weights, in this dtype?")
    return shape[-1]


def _site(name: str, block: int, layer: nn.Module, output: bool, mlp: str) -> Site:
    inside, outside = linear_shape(layer) or (0, 0)
    return Site(name, block, inside, outside, isinstance(layer, Conv1D), output, mlp)


def find_linear_layers(model: PreTrainedModel, width: int) -> tuple[Site, ...]:
    """Finds all linear layers of all blocks, including attention's, from the bottom up: those an adapter may change.

    Args:
        model: The model.
        width: Width of its residual stream.
    """
    prefix, blocks = find_blocks(model)
    return tuple(
        _site(f"{prefix}.{i}.{name}", i, layer, shape[1] == width, f"{prefix}.{i}.{name}".rpartition(".")[0])
        for i, block in enumerate(blocks)
        for name, layer in block.named_modules()
        if (shape := linear_shape(layer))
    )


def select_sites(
    sites: Sequence[Site],
    names: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    count: int | None = None,
) -> tuple[Site, ...]:
    """Selects the sites that match names and block numbers.

    Args:
        sites: All sites of a model.
        names: Module names or patterns such as ``*.mlp.c_proj``; None means any.
        blocks: Block numbers, negative from the top; None means any.
        count: Number of blocks in the model; by default up to the last one with a site.

    Raises:
        UserError: If a name or a block matches nothing.
    """
    count = count or max(s.block for s in sites) + 1
    for block in blocks or ():
        if not -count <= block < count:
            raise UserError(f"block {block}: the model has {count} blocks")
    wanted = None if blocks is None else {b % count for b in blocks}
    chosen = [s for s in sites if wanted is None or s.block in wanted]
    for name in names or ():
        if not any(fnmatch(s.name, name) for s in chosen):
            shown = ", ".join(s.name for s in (chosen or sites)[-6:])
            raise UserError(f"no edit site is called {name!r}; the model's are like: {shown}")
    return tuple(s for s in chosen if names is None or any(fnmatch(s.name, n) for n in names))


def select_feed_forward(
    layout: Layout, names: Sequence[str] | None, blocks: Sequence[int] | None, count: int
) -> tuple[Site, ...]:
    """Selects the feed-forward matrices that match (arguments as for `select_sites`).

    Raises:
        UserError: If a name or a block matches nothing, or most of a block's work is done by routed experts: an edit of
            the rest would pass for one of the whole. Layers that are named are selected anyway.
    """
    chosen = {b % count for b in blocks or range(count)}
    if names is None and (routed := [b for b in sorted(chosen) if b in layout.routed]):
        dense = sorted({s.block for s in layout.sites})
        raise UserError(
            f"block {routed[0]}: {layout.routed[routed[0]]} holds routed experts, which cannot be edited; "
            + (f"choose among the blocks without: {', '.join(map(str, dense))}" if dense else "so have all its blocks")
        )
    return select_sites(layout.sites, names, blocks, count)


def dense_weight(layer: nn.Module, site: Site) -> nn.Parameter:
    """Returns the layer's weight as floats: [in, out] if the site is `transposed`, else [out, in].

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
