"""The project's own commands, one module each.

The first line of a module's docstring is its line in ``instructedit --help``. Its ``main`` is a function, whose
signature and docstring give the command's own ``--help``; or, for many options, a dataclass of them, whose instance is
called; or a dictionary of several of these by name, which are subcommands. With ``POSITIONAL``, required arguments are
positional. ``RENAMED`` maps the old names of renamed options to the new ones.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from argparse import ArgumentError
from itertools import takewhile
from types import ModuleType
from typing import Any

from instructedit.errors import UserError
from instructedit.renamed import warn_renamed


def commands() -> dict[str, ModuleType]:
    """Returns the module of each command by name. Commands import what they need when they run."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name.replace("_", "-"): importlib.import_module(f"{__name__}.{name}") for name in names}


def run_command(name: str, args: list[str]) -> None:
    """Runs a command.

    Raises:
        UserError: If the arguments are wrong, or the command reports an error.
    """
    from jsonargparse import auto_cli

    module = commands()[name]
    positional = getattr(module, "POSITIONAL", False)
    args = _renamed(getattr(module, "RENAMED", {}), args)
    try:
        command = auto_cli(
            module.main,
            args=_listed(module.main, _switched_on(module.main, _underscored(args))),
            as_positional=positional,
            prog=f"instructedit {name}",
            exit_on_error=False,
            return_instance=True,
        )
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    if callable(command):  # a dataclass of options; a function has run already
        command()


def _renamed(names: dict[str, str], args: list[str]) -> list[str]:
    """Replaces the old names of renamed options in the arguments by the new ones, with a warning."""
    found = []
    for arg in args:
        option, sign, value = arg.partition("=")
        if (new := names.get(option.removeprefix("--"))) and option.startswith("--"):
            warn_renamed(option, f"--{new}")
            option = f"--{new}"
        found.append(option + sign + value)
    return found


def _underscored(args: list[str]) -> list[str]:
    """Replaces hyphens in the names of options by underscores: ``--score-every 100`` to ``--score_every 100``."""
    parts = [(arg[2:].partition("="), arg) for arg in args]
    return [
        f"--{name.replace('-', '_')}{sign}{value}" if arg.startswith("--") else arg
        for (name, sign, value), arg in parts
    ]


def _switched_on(main: Any, args: list[str]) -> list[str]:
    """Completes on-off options that stand alone in the arguments: ``--supported`` to ``--supported=true``."""
    options = _options(main, "bool")
    alone = [i + 1 == len(args) or args[i + 1].startswith("-") for i in range(len(args))]
    return [f"{arg}=true" if arg in options and bare else arg for arg, bare in zip(args, alone, strict=True)]


def _listed(main: Any, args: list[str]) -> list[str]:
    """Joins the words after a list option into one list, its value: ``--ask A B``, ``--seeds 0 1``.

    A value that is written as a list, ``--ask '["A", "B"]'``, is left unchanged.
    """
    texts = _options(main, r"list\[(str|Literal\[.*\])\]( \| None)?")
    numbers = _options(main, r"list\[int\]( \| None)?")
    found: list[str] = []
    rest = list(args)
    while rest:
        found.append(rest.pop(0))
        if found[-1] in texts | numbers:
            words = list(takewhile(lambda word: not word.startswith("--"), rest))
            del rest[: len(words)]
            whole = len(words) == 1 and words[0].startswith("[") and words[0].endswith("]")
            one = json.dumps(words) if found[-1] in texts else f"[{', '.join(words)}]"
            found += words if whole or not words else [one]
    return found


def _options(main: Any, annotation: str) -> set[str]:
    """Returns the options of a command, or of all its subcommands, whose type as text matches a pattern."""
    functions = main.values() if isinstance(main, dict) else [main]
    return {
        f"--{name}" for function in functions for name, parameter in inspect.signature(function).parameters.items()
        if re.fullmatch(annotation, str(getattr(parameter.annotation, "__name__", parameter.annotation)))
    }  # fmt: skip
