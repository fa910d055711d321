"""Errors that a user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

_LONGEST = 2000  # characters of an error's line


class UserError(ValueError):
    """A problem with what the user gave: a file, a field, a name, a checkpoint.

    Its message is one line that says what is wrong and where. The command line prints that line and exits
    with status 2, without a traceback.
    """


def one_line(error: Exception) -> str:
    """Returns an error's message as one line, shortened where it is too long: it may quote text from any file."""
    line = " ".join(str(error).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 4 :]}"


def at_least(low: float, **values: float | None) -> None:
    """Checks that values are not below a minimum and not NaN; None is skipped.

    Args:
        low: The smallest value that is allowed.
        values: The values by their names.

    Raises:
        UserError: For the first value that fails the check.
    """
    for name, value in values.items():
        if value is not None and not value >= low:
            raise UserError(f"{name} must be at least {low}, got {value}")


def unknown(kind: str, name: str, known: Sequence[str]) -> UserError:
    """Builds the error for an unknown name: one line with the closest known name and the list of all known names."""
    near = get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint}; there are: {', '.join(known) or 'none'}")
