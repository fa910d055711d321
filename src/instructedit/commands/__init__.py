"""The project's own commands, one module each.

A module's docstring is its line in ``instructedit --help``. Its ``main`` is a function, whose signature and docstring
are the command's own ``--help``, or several by name: subcommands. With ``POSITIONAL``
required arguments need no option.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from argparse import ArgumentError
from types import ModuleType
from typing import Any

from instructedit.errors import UserError


def commands() -> dict[str, ModuleType]:
    """Name → module of each command. They import what they need when they run."""
    return {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}


def run_command(name: str, args: list[str]) -> None:
    """Runs a command.

    Raises:
        UserError: If the arguments are wrong, or the command finds something to complain of.
    """
    from jsonargparse import auto_cli

    module = commands()[name]
    positional = getattr(module, "POSITIONAL", False)
    try:
        auto_cli(
            module.main,
            args=_switched_on(module.main, args),
            as_positional=positional,
            prog=f"instructedit {name}",
            exit_on_error=False,
        )
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error


def _switched_on(main: Any, args: list[str]) -> list[str]:
    """Arguments in which an option that is on or off may stand alone: ``--supported`` is ``--supported=true``."""
    functions = main.values() if isinstance(main, dict) else [main]
    options = {
        f"--{name}" for function in functions for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation in (bool, "bool")
    }  # fmt: skip
    alone = [i + 1 == len(args) or args[i + 1].startswith("-") for i in range(len(args))]
    return [f"{arg}=true" if arg in options and bare else arg for arg, bare in zip(args, alone, strict=True)]
