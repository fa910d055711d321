"""Provenance of a run: versions of packages, the code's commit, and the kind of machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "lightning", "transformers", "mlflow", "instructedit")
_HERE = Path(__file__).resolve().parent

UNKNOWN = "unknown"


def provenance() -> dict[str, str]:
    """Describes the software, the code and the kind of machine of this process; names no host, user or folder.

    Returns:
        ``python`` and the packages' versions, ``git.commit`` and ``git.dirty`` ("true" when something is changed or
        untracked), ``platform``, ``device`` and, where there is a constraints.txt in the working directory or above
        the package, its sha256 as ``constraints``. What cannot be determined is "unknown".
    """
    facts = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    facts |= _git() | {"platform": platform.platform(), "device": _device()}
    for folder in (Path.cwd(), *_HERE.parents):
        if (file := folder / "constraints.txt").is_file():
            return facts | {"constraints": hashlib.sha256(file.read_bytes()).hexdigest()}
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path that was never installed
        return UNKNOWN


def _git() -> dict[str, str]:
    # An installed copy may lie in somebody else's repository (their .venv): that commit would say nothing about ours.
    installed = "site-packages" in _HERE.parts
    commit = None if installed else _ask_git("rev-parse", "HEAD")
    changes = None if commit is None else _ask_git("status", "--porcelain")
    return {
        "git.commit": commit or UNKNOWN,
        "git.dirty": UNKNOWN if changes is None else str(bool(changes)).lower(),
    }


def _ask_git(*question: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(_HERE), *question]  # no locks: `status` would write the index
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def flat_parameters(value: Any, name: str = "") -> dict[str, Any]:
    """Flattens nested parameters to slash-separated paths, made of keys and, for lists of mappings, of indices."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif isinstance(value, Namespace):
        value = vars(value)
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {name: value}
    prefix = f"{name}/" if name else ""
    return {
        path: leaf for key, inner in value.items() for path, leaf in flat_parameters(inner, f"{prefix}{key}").items()
    }
