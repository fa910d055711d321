"""Plug-ins found by importing the folder they live in: a new file is enough to add one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

from instructedit.errors import unknown

T = TypeVar("T")


def plugins(base: type[T], package: str) -> dict[str, type[T]]:
    """Every named subclass of `base`: those in the modules of `package`, and those that a user's code defined.

    A class takes part by setting its own ``name``.
    """
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{package}.{module.name}")
    found: dict[str, type[T]] = {}
    todo = [base]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if name := cls.__dict__.get("name"):
            found[name] = cls
    return dict(sorted(found.items()))


def plugin(base: type[T], package: str, name: str) -> type[T]:
    """The subclass of `base` called `name`.

    Raises:
        UserError: If there is none; the message lists those that exist.
    """
    found = plugins(base, package)
    if name not in found:
        raise unknown(base.__name__.lower(), name, list(found))
    return found[name]
