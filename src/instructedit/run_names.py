"""Names and tags of runs, and the command that comes next after a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from instructedit.redaction import redacted

#: Tags of a run: the command line as it was typed, and the fit whose editor is scored.
COMMAND, FIT_RUN = "command", "fit_run_id"
NOTE = "mlflow.note.content"  # a run's description in MLflow's UI
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_LONGEST = 6000  # characters of a tag
_CHECKPOINT = "--ckpt_path"


def run_name(command: str, editor: str, lm: str, seed: object) -> str:
    """Returns a name that describes a run: ``fit · InstructEdit · smollm2-135m · seed 0``."""
    return " · ".join([command, editor, Path(lm).name or lm, f"seed {seed}"])


def run_tags(typed: Sequence[str], checkpoint: str | None = None) -> dict[str, str]:
    """Returns a run's tags: its command line, also as its description, and the run whose checkpoint it uses.

    Passwords are hidden, and a command line that is too long for a tag is cut.
    """
    command = redacted(shlex.join(["instructedit", *typed]))[:_LONGEST]
    tags = {COMMAND: command, NOTE: f"`{command}`"}
    parts = [part for part in Path(checkpoint or "").parts if _RUN_ID.fullmatch(part)]
    return tags | ({FIT_RUN: parts[-1]} if parts else {})


def next_command(run_id: str, status: str, tags: Mapping[str, str]) -> str:
    """Returns the command that comes next after a run; empty if there is none.

    A finished fit is tested with the options that it was started with; an unfinished one resumes from its last
    checkpoint; a tested editor makes edits.
    """
    command = tags.get(COMMAND, "")
    words = shlex.split(command) if len(command) < _LONGEST else []  # one that was cut cannot be given again
    if len(words) < 2:
        return ""
    if words[1] == "fit":
        through = status == "FINISHED"
        return shlex.join(
            ["instructedit", "test" if through else "fit", *_without_checkpoint(words[2:]), _CHECKPOINT, run_id]
        )
    if FIT_RUN in tags:
        return f'instructedit edit --editor {tags[FIT_RUN]} --prompt "…" --target "…"'
    return ""


def _without_checkpoint(words: Sequence[str]) -> list[str]:
    left, rest = list(words), []
    while left:
        word = left.pop(0)
        if word == _CHECKPOINT:
            del left[:1]
        elif not word.startswith(f"{_CHECKPOINT}="):
            rest.append(word)
    return rest
