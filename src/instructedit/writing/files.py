"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instructedit.errors import UserError


def write_whole(path: Path, text: str, check: Callable[[Path], object] = lambda file: None) -> None:
    """Writes a file beside its place and puts it there once it is whole; a good one is never replaced by a part.

    Args:
        path: Of the file; its folder is made.
        text: Its contents.
        check: Reads the finished file before it takes its place; what it raises leaves the old file as it was.

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
    """Writes plain data, whole."""
    write_whole(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads plain data; None where there is no file.

    Raises:
        UserError: If it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to begin anew") from error
