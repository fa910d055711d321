"""Atomic writing of files: a file is either complete or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instructedit.errors import UserError


def write_whole(path: Path, text: str, check: Callable[[Path], object] = lambda file: None) -> None:
    """Writes a file under another name and moves it into place once complete, so that it is never partly written.

    Args:
        path: Path of the file; its folder is created.
        text: Contents of the file.
        check: Reads the finished file before it is moved into place; if it raises an error, the old file stays.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    made = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.chmod(0o644)
        check(made)
        made.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        made.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes plain data to a JSON file, completely or not at all."""
    write_whole(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads plain data from a JSON file; None if there is no file.

    Raises:
        UserError: If it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to begin anew") from error
