"""Where tables are printed."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

from instructedit.errors import UserError, one_line

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """The terminal at its own width, or 120 columns where there is none: a log, a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def report_error(what: str, error: Exception) -> None:
    """Prints one line about what failed, below the traceback unless the user is to blame."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    print(f"instructedit: error: {what}: {one_line(error)}", file=sys.stderr)
