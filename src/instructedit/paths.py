"""Where the shipped files are, where things are kept on this machine, and whether a folder can be written into."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from instructedit.errors import UserError

_SQLITE = b"SQLite format 3\0"  # begins every database
_HERE = Path(__file__).resolve().parent

#: The folder with ``configs/`` and ``experiments/``: in an installed package what the wheel brought (setup.py), in a
#: checkout its top, whose files are read where they stand.
SHARED = _HERE / "_shared" if (_HERE / "_shared").is_dir() else _HERE.parents[1]

#: What every run reads first.
DEFAULTS = SHARED / "configs" / "default.yaml"


def cache_folder() -> Path:
    """Where models, second moments and states are kept: $INSTRUCTEDIT_CACHE, else ~/.cache/instructedit."""
    return Path(os.environ.get("INSTRUCTEDIT_CACHE") or Path.home() / ".cache" / "instructedit").expanduser()


def check_writable(folder: str | Path, option: str) -> Path:
    """Finds out before any work whether a folder, there already or not, can be written; makes nothing.

    Args:
        folder: The folder.
        option: What the user calls it, for the error.

    Returns:
        Its absolute path, without links and "..".

    Raises:
        UserError: If it is a file, lies below one, or cannot be written.
    """
    path = Path(folder).expanduser().resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{option} {folder}: {'is' if there == path else f'{there} is'} a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{option} {folder}: {there} cannot be written ({error.strerror})") from error
    return path


def check_writable_file(file: str | Path, option: str) -> Path:
    """Finds out before any work whether a file, there already or not, can be written; makes nothing.

    Raises:
        UserError: If it is a folder, or its own folder cannot be written (see `check_writable`).
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise UserError(f"{option} {file}: is a folder, not a file")
    check_writable(path.parent, f"{option} {file}: its folder")
    return path


def check_database(file: Path) -> None:
    """Finds out before any work whether an SQLite database, if it is there, can be used.

    Raises:
        UserError: If it is damaged, or cannot be written.
    """
    if not file.exists():
        return
    try:
        with file.open("r+b") as opened:
            sound = opened.read(len(_SQLITE)) == _SQLITE
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
    if not sound:
        raise UserError(f"{file}: damaged: not a database; move it away to begin anew")
