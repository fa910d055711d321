"""Hyper-parameters as fields: one declaration is the constructor, the config schema and the help."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, dataclass_transform, get_type_hints

T = TypeVar("T")

#: An option's value that stands for one which is derived from the model itself.
AUTO: Literal["auto"] = "auto"


@dataclass_transform(eq_default=False)
def options(cls: type[T]) -> type[T]:
    """A dataclass whose constructor knows the types of its arguments, those of inherited fields among them.

    A plain dataclass leaves annotations as strings (``from __future__ import annotations``), which the command line
    would take for any type at all.
    """
    made: Any = dataclass(eq=False, repr=False)(cls)
    hints = get_type_hints(made)
    made.__init__.__annotations__ = {field.name: hints[field.name] for field in fields(made)} | {"return": None}
    return made
