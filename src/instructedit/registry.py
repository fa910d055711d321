"""Plug-ins found by importing the folder they live in, or by the entry points of other packages."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from instructedit.errors import UserError, unknown

T = TypeVar("T")


def plugins(base: type[T], package: str) -> dict[str, type[T]]:
    """Finds every named subclass of `base`: those in the modules of `package`, and those that a user's code defined.

    A class is included if it sets its own ``name``.
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
    """Returns the subclass of `base` called `name`; one of another package is imported now, by its entry point.

    Raises:
        UserError: If there is none (the message lists those that exist), or another package's cannot be used.
    """
    found = plugins(base, package)
    if name not in found and name in _brought(package):
        return _loaded(base, _brought(package)[name])
    if name not in found:
        raise unknown(base.__name__.lower(), name, names(base, package))
    return found[name]


def names(base: type[T], package: str) -> list[str]:
    """Lists the names of all plug-ins in order, including those of other packages, which are not imported."""
    return sorted({*plugins(base, package), *_brought(package)})


@cache  # reading every installed package's metadata takes a while
def _brought(package: str) -> dict[str, EntryPoint]:
    """Finds the plug-ins of other packages: entry points whose group is named after our package of such plug-ins."""
    return {point.name: point for point in entry_points(group=package)}


def _loaded(base: type[T], point: EntryPoint) -> type[T]:
    where = f"entry point {point.name!r} of group {point.group!r} ({point.value})"
    try:
        found = point.load()
    except Exception as error:  # any error: it is another package's code
        raise UserError(f"{where}: cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base) and found.__dict__.get("name") == point.name):
        raise UserError(f"{where}: is no subclass of {base.__name__} with the name {point.name!r}")
    return found
