"""Locates trained editors: the file that a folder, a run or a hub id refers to."""

from __future__ import annotations

import re
from pathlib import Path

from instructedit.errors import UserError

CONFIG, WEIGHTS = "editor.json", "editor.safetensors"
#: Refers to the trained editor whose run ended last.
LATEST = "latest"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_LISTED = 5  # most runs that an error lists


def find_editor(source: str | Path, root: str | Path = "mlruns") -> Path:
    """Finds the saved editor or the checkpoint that a source refers to.

    Args:
        source: A folder that `Editor.save_pretrained` wrote, a checkpoint (``.ckpt``), a folder that
            contains some, such as a run's (the latest is taken), the id of a run, a name that only one finished run
            with checkpoints has, ``latest`` (the one of these that ended last), or a hub id ``owner/name``.
        root: Folder of the store in which runs are looked up.

    Returns:
        A folder with ``editor.json``, or a checkpoint file.

    Raises:
        UserError: If there is no such editor.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _run(str(source), Path(root)) or _from_hub(str(source))
    if path.is_file():
        return path
    if (path / CONFIG).is_file():
        return path
    checkpoints = sorted(path.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not checkpoints:
        raise UserError(f"{source}: no editor here (neither {CONFIG} nor a .ckpt)")
    return checkpoints[-1]


def check_run_id(run_id: str | None) -> None:
    """Raises an error if a string cannot be the id of a run.

    Raises:
        UserError: If it is not an id.
    """
    if run_id is not None and not _RUN_ID.fullmatch(run_id):
        raise UserError(f"run_id {run_id!r}: not the id of a run, which has 32 hexadecimal digits")


def is_place(source: str, root: str | Path = "mlruns") -> bool:
    """True if a word refers to a file, a folder, a run or a hub id, rather than to a method by its name.

    Raises:
        UserError: If it is a run's id, or ``latest``, and there is no such run; or if it is the name of several runs.
    """
    return Path(source).expanduser().exists() or "/" in source or _run(source, Path(root)) is not None


def _run(source: str, root: Path) -> Path | None:
    """Returns a run's folder, <root>/<experiment>/<run>, if the source is its id or name, or ``latest``; else None."""
    if _RUN_ID.fullmatch(source):
        if not (found := _folders(source, root)):
            raise UserError(f"{source}: no run in {root} with checkpoints has this id")
        return found[0]
    if "/" in source or not root.expanduser().is_dir():
        if source == LATEST:
            raise UserError(f"{LATEST}: there is no store of runs at {root}")
        return None
    from instructedit.tracking import finished_runs  # only where the store is needed: the import takes seconds

    fits = [(name, folders[0]) for run, name in finished_runs(root) if (folders := _folders(run, root))]
    if source == LATEST:
        if not fits:
            raise UserError(f"{LATEST}: no finished run in {root} has checkpoints")
        return fits[0][1]
    named = [folder for name, folder in fits if name == source]
    if len(named) > 1:
        ids = ", ".join(folder.name for folder in named[:_LISTED]) + (", …" if len(named) > _LISTED else "")
        raise UserError(f"{source}: {len(named)} finished runs in {root} have this name: give the id of one ({ids})")
    return named[0] if named else None


def _folders(run: str, root: Path) -> list[Path]:
    """Returns a run's folders that contain checkpoints."""
    return [folder for folder in root.expanduser().glob(f"*/{run}") if any(folder.rglob("*.ckpt"))]


def _from_hub(source: str) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith(".ckpt"):
        raise UserError(f"{source}: no such file, folder, run or editor on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{source}: neither a local path nor to be had from the hub ({error})") from error
