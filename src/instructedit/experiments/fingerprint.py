"""Fingerprints of runs, which are equal if two runs have the same options, files and code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from instructedit.paths import DEFAULTS

#: Folder of the package.
SOURCE = Path(__file__).resolve().parents[1]

# Parts without influence on a run: they show results, are separate commands, or find configs (counted if a run names
# them).
_APART = (
    "_shared",
    "analysis",
    "benchmark",
    "commands",
    "experiments",
    "writing",
    "cli.py",
    "configs.py",
    "console.py",
)
_STORED = "analysis/areas.py"  # except for this one: what it computes is stored with a run


def fingerprint(args: Sequence[str]) -> str:
    """Hashes all inputs of a run (sha256, hex): command line, files named there, the package, and its defaults.

    A file counts with its contents, wherever it lies. Folders (a local LM, datasets), the hub, the installed packages
    and the machine are ignored, and so are the parts of the package without influence on a run.
    """
    parts = [_package()]
    for arg in args:
        option, _, value = arg.partition("=")
        parts.append(f"{option}={_sha256(Path(value))}" if os.path.isfile(value) else arg)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _package() -> str:
    apart = {SOURCE / name for name in _APART}
    files = sorted(path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    files = [path for path in files if path == SOURCE / _STORED or apart.isdisjoint((path, *path.parents))]
    names = [path.relative_to(SOURCE).as_posix() for path in files]
    parts = [*zip(names, map(_sha256, files), strict=True), ("defaults", _sha256(DEFAULTS))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
