"""Paths of shipped files and of this machine's caches, and checks that folders and files can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from instructedit.errors import UserError

_SQLITE = b"SQLite format 3\0"  # the first bytes of every database
_HERE = Path(__file__).resolve().parent

#: The folder with ``configs/`` and ``experiments/``: in an installed package the wheel's copy (setup.py), in a checkout
#: its top folder.
SHARED = _HERE / "_shared" if (_HERE / "_shared").is_dir() else _HERE.parents[1]

#: The config that every run reads first.
DEFAULTS = SHARED / "configs" / "default.yaml"


def cache_folder() -> Path:
    """Returns the folder of models, covariances and states: $INSTRUCTEDIT_CACHE, else ~/.cache/instructedit."""
    return Path(os.environ.get("INSTRUCTEDIT_CACHE") or Path.home() / ".cache" / "instructedit").expanduser()


def check_writable(folder: str | Path, option: str) -> Path:
    """Checks before any work that a folder, existing or not, can be written; creates nothing.

    Args:
        folder: The folder.
        option: The user's name for it, for the error message.

    Returns:
        Its absolute path, with links and ".." resolved.

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
    """Checks before any work that a file, existing or not, can be written; creates nothing.

    Raises:
        UserError: If it is a folder, or its own folder cannot be written (see `check_writable`).
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise UserError(f"{option} {file}: is a folder, not a file")
    check_writable(path.parent, f"{option} {file}: its folder")
    return path


def check_database(file: Path) -> None:
    """Checks before any work that an SQLite database, if it exists, can be used.

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
