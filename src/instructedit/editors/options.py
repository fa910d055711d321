"""Hyper-parameters as fields: one declaration is the constructor, the config schema and the help."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from instructedit.errors import UserError, at_least

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


def check_numbers(made: Any) -> None:
    """Refuses options of an editor that should be numbers and are not; whole numbers are counts, none below zero.

    Raises:
        UserError: For the first of them.
    """
    for option, kind in type(made).__init__.__annotations__.items():
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if not hasattr(made, option):  # a constructor of its own, which has not got so far
            continue
        value = getattr(made, option)
        words = [word for each in kinds for word in get_args(each)]  # of a Literal
        if not {int, float}.intersection(kinds) or value in words or (value is None and NoneType in kinds):
            continue
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"editor {made.name!r}: {option} must be a number, got {value!r}")
        if int in kinds:
            at_least(0, **{f"editor {made.name!r}: {option}": float(value)})
