"""Where tables are printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """The terminal at its own width, or 120 columns where there is none: a log, a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)
