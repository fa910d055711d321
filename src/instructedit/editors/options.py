"""Hyper-parameters as dataclass fields: one declaration for the constructor, the config schema and the help."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from instructedit.errors import UserError, at_least

T = TypeVar("T")

#: Option value that stands for a value derived from the model itself.
AUTO: Literal["auto"] = "auto"


@dataclass_transform(eq_default=False)
def options(cls: type[T]) -> type[T]:
    """Makes a class a dataclass whose constructor has resolved types for its arguments, including inherited ones.

    A plain dataclass leaves annotations as strings (``from __future__ import annotations``), which the command line
    would treat as accepting any type.
    """
    made: Any = dataclass(eq=False, repr=False)(cls)
    hints = get_type_hints(made)
    made.__init__.__annotations__ = {field.name: hints[field.name] for field in fields(made)} | {"return": None}
    return made


def check_numbers(made: Any) -> None:
    """Checks that an editor's numeric options are numbers; integer options are counts and must not be negative.

    Raises:
        UserError: For the first option that is invalid.
    """
    for option, kind in type(made).__init__.__annotations__.items():
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if not hasattr(made, option):  # set later by the class's own constructor
            continue
        value = getattr(made, option)
        words = [word for each in kinds for word in get_args(each)]  # values of a Literal
        if not {int, float}.intersection(kinds) or value in words or (value is None and NoneType in kinds):
            continue
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"editor {made.name!r}: {option} must be a number, got {value!r}")
        if int in kinds:
            at_least(0, **{f"editor {made.name!r}: {option}": float(value)})
