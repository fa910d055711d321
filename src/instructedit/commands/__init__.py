"""The project's own commands, one module each.

A module's docstring is its line in ``instructedit --help``. Its ``main`` is a function, whose signature and docstring
are the command's own ``--help``, or several by name: subcommands. With ``POSITIONAL``
required arguments need no option.
"""

from __future__ import annotations

import importlib
import pkgutil
from argparse import ArgumentError
from types import ModuleType

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
        auto_cli(module.main, args=args, as_positional=positional, prog=f"instructedit {name}", exit_on_error=False)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
