"""Hyper-parameters as dataclass fields: one declaration for the constructor, the config schema and the help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from instructedit.errors import UserError, at_least

T = TypeVar("T")

#: Option value that stands for a value derived from the model itself.
AUTO: Literal["auto"] = "auto"


_ADJUSTABLE = "adjustable"


def adjustable(*, default: Any) -> Any:
    """Declares an option that may still change when the editor has been trained (see `adjust`)."""
    return field(default=default, metadata={_ADJUSTABLE: True})


@dataclass_transform(eq_default=False, field_specifiers=(adjustable,))
def options(cls: type[T]) -> type[T]:
    """Makes a class a dataclass whose constructor has resolved types for its arguments, including inherited ones.

    A plain dataclass leaves annotations as strings (``from __future__ import annotations``), which the command line
    would treat as accepting any type.
    """
    made: Any = dataclass(eq=False, repr=False)(cls)
    hints = get_type_hints(made)
    made.__init__.__annotations__ = {field.name: hints[field.name] for field in fields(made)} | {"return": None}
    return made


def adjustable_options(editor: Any) -> list[str]:
    """Returns the names of the options of an editor, or of its class, that may change after training."""
    return [each.name for each in fields(editor) if each.metadata.get(_ADJUSTABLE)]


def adjust(made: Any, values: Mapping[str, Any]) -> None:
    """Changes options of a trained editor.

    Raises:
        UserError: If one of them cannot change after training, or its value is invalid.
    """
    known = adjustable_options(made)
    for option in values:
        if option not in known:
            rest = f"only {' and '.join(known)} may change" if known else "none may change"
            raise UserError(
                f"editor {made.name!r}: {option} is as it was in training; of a trained one's options {rest}"
            )
    for option, value in values.items():
        setattr(made, option, value)
    check_numbers(made)


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
