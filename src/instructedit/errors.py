"""Errors that a user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

_LONGEST = 2000  # characters of a line


class UserError(ValueError):
    """A problem with what the user gave: a file, a field, a name, a checkpoint.

    Its message is one line that says what is wrong and where. The command line prints that line and exits
    with status 2, without a traceback.
    """


def one_line(error: Exception) -> str:
    """What an error says, in one line that is no longer than somebody reads; files of strangers can be quoted in it."""
    line = " ".join(str(error).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 4 :]}"


def at_least(low: float, **values: float | None) -> None:
    """Refuses values that are too small, or no numbers; None is no value.

    Args:
        low: The smallest value that is allowed.
        values: Them by their names.

    Raises:
        UserError: For the first that is.
    """
    for name, value in values.items():
        if value is not None and not value >= low:
            raise UserError(f"{name} must be at least {low}, got {value}")


def unknown(kind: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a name that is not there: one line with the nearest of those that are, and all of them."""
    near = get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint}; there are: {', '.join(known) or 'none'}")
