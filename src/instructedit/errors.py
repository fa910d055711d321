"""Errors that a user can act on."""

from __future__ import annotations


class UserError(ValueError):
    """A problem with what the user gave: a file, a field, a name, a checkpoint.

    Its message is one line that says what is wrong and where. The command line prints that line and exits
    with status 2, without a traceback.
    """
