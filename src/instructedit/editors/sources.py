"""Where a trained editor is: which file a folder, a run, or a hub id means."""

from __future__ import annotations

import re
from pathlib import Path

from instructedit.errors import UserError

CONFIG, WEIGHTS = "editor.json", "editor.safetensors"
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def find_editor(source: str | Path, root: str | Path = "mlruns") -> Path:
    """The saved editor or the checkpoint that a source means.

    Args:
        source: A folder that `Editor.save_pretrained` wrote, a checkpoint (``.ckpt``), a folder that holds some (a
            run's: the latest counts), the id of a run, or a hub id ``owner/name``.
        root: Folder of the store that a run's id is looked up in.

    Returns:
        A folder with ``editor.json``, or a checkpoint file.

    Raises:
        UserError: If there is none.
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


def is_place(source: str) -> bool:
    """Whether a word means a file, a folder, a run or a hub id, rather than a method by its name."""
    return Path(source).exists() or "/" in source or bool(_RUN_ID.fullmatch(source))


def _run(source: str, root: Path) -> Path | None:
    """The folder of a run's checkpoints, <root>/<experiment>/<run>, if the source is its id."""
    if not _RUN_ID.fullmatch(source):
        return None
    found = [folder for folder in root.expanduser().glob(f"*/{source}") if folder.is_dir()]
    if not found:
        raise UserError(f"{source}: no run in {root} with checkpoints has this id")
    return found[0]


def _from_hub(source: str) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith(".ckpt"):
        raise UserError(f"{source}: no such file, folder, run or editor on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{source}: neither a local path nor to be had from the hub ({error})") from error
