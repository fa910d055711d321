"""Deprecated names of public objects, which work for one more version and warn of the new ones."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Renamed:
    """Descriptor that forwards a renamed or moved attribute, with a DeprecationWarning that gives the new name.

    Args:
        old: The old name, for the message.
        path: The new name, as seen from the object: ``token_ids``, ``scores.token_scores``.
    """

    def __init__(self, old: str, path: str) -> None:
        self.old, self.path = old, path

    @classmethod
    def keep(cls, owner: type, **paths: str) -> None:
        """Makes attributes of a class available under their old names too: old name → new path."""
        for name, path in paths.items():
            setattr(owner, name, cls(f"{owner.__name__}.{name}", path))

    @classmethod
    def adopt(cls, owner: type, **new: str) -> None:
        """Uses methods that a subclass defines under old names as those of the new names: old name → new name."""
        for old in new.keys() & vars(owner).keys():
            warn_renamed(f"{owner.__name__}.{old}", new[old])
            setattr(owner, new[old], vars(owner)[old])

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warn_renamed(self.old, f".{self.path}")
        return operator.attrgetter(self.path)(instance)

    def __set__(self, instance: Any, value: Any) -> None:
        warn_renamed(self.old, f".{self.path}")
        place, _, name = self.path.rpartition(".")
        setattr(operator.attrgetter(place)(instance) if place else instance, name, value)


def renamed_names(module: str, **new: Any) -> Callable[[str], Any]:
    """Makes a module's ``__getattr__``, which resolves old names to the renamed objects, with a warning.

    Args:
        module: The module's name.
        new: Old name → the object that it names.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in new:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", new[name].__name__)
        return new[name]

    return __getattr__


def renamed_arguments(**new: str) -> Callable[[F], F]:
    """Lets a function take keyword arguments under their old names, with a warning: old name → new name."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for old in new.keys() & options.keys():
                warn_renamed(f"the argument {old}", new[old])
                options[new[old]] = options.pop(old)
            return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate


def warn_renamed(old: str, new: str) -> None:
    """Warns the caller's caller that a name is deprecated."""
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=3)
