"""Temporary changes to a model for one forward pass; each context manager restores the model afterwards."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm.sharding import is_sharded, let_go

#: Attributes of a module that hold its forward hooks, and which of these receive keyword arguments.
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs")
#: `HOOKS` and the hooks that run before a module, which would gather the weights of a sharded block needlessly.
ALL_HOOKS = (*HOOKS, "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class StopForward(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass once everything that is needed has been recorded."""


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the states that enter a module, which models pass by position or by name."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))


def input_of(block: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """Returns the hidden states that enter a block when `forward` runs the model, and stops the pass there."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise StopForward(entering(args, kwargs))

    try:
        return _caught(block.register_forward_pre_hook(hook, with_kwargs=True), forward)
    finally:
        let_go(block)


def output_of(block: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """Returns the hidden states that leave a block when `forward` runs the model, and stops the pass there."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise StopForward(output[0] if isinstance(output, tuple | list) else output)

    return _caught(block.register_forward_hook(hook), forward)


@contextmanager
def contiguous_inputs(layer: nn.Module | None) -> Iterator[None]:
    """Makes the inputs of a layer contiguous inside a ``with`` block.

    On a CPU, the bfloat16 product of a slice, such as each row's last position, takes hundreds of times as long.
    """

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)

    handle = layer.register_forward_pre_hook(hook) if layer is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _caught(handle: RemovableHandle, forward: Callable[[], Any]) -> Tensor:
    """Runs `forward` until the hook stops it, removes the hook, and returns the states that it stopped with."""
    try:
        forward()
    except StopForward as stop:
        found: Tensor = stop.args[0]
        return found
    finally:
        handle.remove()
    raise AssertionError("the block did not run")


@contextmanager
def resumed(blocks: nn.ModuleList, start: int, hidden: Tensor | None, values: int) -> Iterator[None]:
    """Skips the blocks below `start` in a ``with`` block: `hidden` enters block `start`, or what follows the last.

    The model still builds its own masks and rotary tables, whatever its architecture.

    Args:
        blocks: All blocks of the model.
        start: The first one that runs.
        hidden: States that enter it; None changes nothing.
        values: Number of values that the model's blocks return (see `values_of`).
    """
    if hidden is None:
        yield
        return

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def give(*args: Any, **kwargs: Any) -> Any:
        return (hidden, *[None] * (values - 1)) if values else hidden

    with ExitStack() as stack:
        if not start:
            stack.callback(blocks[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for block in blocks[:start]:
            if is_sharded(block):
                stack.enter_context(hooked({block: {kind: OrderedDict() for kind in ALL_HOOKS}}))
            stack.enter_context(patched(block, give))
        yield


@contextmanager
def activation_checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Makes blocks keep only their inputs; a backward pass runs each again, with the edits that are applied now.

    transformers' own gradient checkpointing works in train mode alone, and on all blocks.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(patched(block, functools.partial(_checkpointed, block, block.forward)))
        yield


def _checkpointed(block: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return own(*args, **kwargs)
    # By the time of the backward pass the edits may be removed, or others applied.
    then = {module: {kind: getattr(module, kind).copy() for kind in HOOKS} for module in block.modules()}
    return checkpoint(
        own, *args, use_reentrant=False, preserve_rng_state=False,  # eval mode draws no random numbers
        context_fn=lambda: (nullcontext(), hooked(then)), **kwargs,
    )  # fmt: skip


@contextmanager
def hooked(then: Mapping[nn.Module, Mapping[str, Any]]) -> Iterator[None]:
    """Replaces hooks of modules inside a ``with`` block: module → kind (see `HOOKS`) → all its hooks of that kind."""
    now = {module: {kind: getattr(module, kind) for kind in kinds} for module, kinds in then.items()}
    try:
        _hook(then)
        yield
    finally:
        _hook(now)


def _hook(modules: Mapping[nn.Module, Mapping[str, Any]]) -> None:
    for module, kinds in modules.items():
        for kind, hooks in kinds.items():
            setattr(module, kind, hooks)


def bare(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Removes forward hooks in a ``with`` block, those of edits and of observers; sharded modules keep theirs."""
    return hooked({module: {"_forward_hooks": OrderedDict()} for module in modules if not is_sharded(module)})


@contextmanager
def patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Makes a module run `forward` in place of its own inside a ``with`` block."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def applied(model: nn.Module, edit: Edit | None, rows: Tensor | None) -> Iterator[None]:
    """Applies each row's edit to its outputs at the edit's sites, inside a ``with`` block."""
    if edit is None:
        yield
        return
    batch = _BatchSize()
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(batch.note, with_kwargs=True).remove)
        for site in edit.sites:
            hook = functools.partial(_apply, edit, site, rows, batch)
            stack.callback(model.get_submodule(site).register_forward_hook(hook, with_kwargs=True).remove)
        yield


class _BatchSize:
    """The number of rows in a forward pass, which a layer that flattens all rows into one cannot tell."""

    rows = 1

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        self.rows = next(len(tensor) for tensor in given if tensor is not None)


def _apply(
    edit: Edit, site: str, rows: Tensor | None, batch: _BatchSize, layer: nn.Module, args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor], output: Tensor,
) -> Tensor:  # fmt: skip
    inputs = entering(args, kwargs)
    if inputs.ndim == 2:  # an MLP that flattens all rows into one, such as OPT's
        inputs, apart = (t.reshape(batch.rows, -1, t.shape[-1]) for t in (inputs, output))
        check_rows(edit, rows, batch.rows)
        return edit.change(site, inputs, apart, rows).reshape(output.shape)
    check_rows(edit, rows, inputs.shape[0])
    return edit.change(site, inputs, output, rows)


def check_rows(edit: Edit, rows: Tensor | None, count: int) -> None:
    """Checks that edits fit a batch of `count` rows; without `rows`, row i has edit i, or all rows the only one.

    Raises:
        UserError: If they do not.
    """
    if rows is None and len(edit) not in (1, count):
        raise UserError(
            f"{len(edit)} edits and a batch of {count} rows: say which edit each row has (rows=[…]), choose "
            "edit[i], or join them by edit.joined()"
        )
    if rows is not None and len(rows) != count:
        raise UserError(f"rows names the edits of {len(rows)} rows, the batch has {count}")


def values_of(block: nn.Module, forward: Callable[[], Any]) -> int:
    """Counts the values that a block returns, hidden states first; 0 if it returns these alone (models differ)."""
    found: list[int] = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple | list) else 0)

    handle = block.register_forward_hook(hook)
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    return found[0]
