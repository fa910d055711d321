"""Printing of tables and errors to the terminal."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

from instructedit.errors import UserError, one_line

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Returns a console as wide as the terminal, or 120 columns wide where there is none, such as in a log or pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def report_error(what: str, error: Exception) -> None:
    """Prints one line about what failed, below the traceback unless it is a `UserError`."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    print(f"instructedit: error: {what}: {one_line(error)}", file=sys.stderr)
