"""Chooses an editor by a method's name or by the location of a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructedit.editors.base import PACKAGE, Editor, build_editor, load_editor
from instructedit.editors.options import adjust
from instructedit.editors.saved import read_editor
from instructedit.editors.sources import find_editor, is_place
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.registry import names


def editor_names() -> list[str]:
    """Returns the names that `build_editor` knows."""
    return names(Editor, PACKAGE)


def lm_of(source: str | Path) -> str | None:
    """Returns the name of the LM that an editor was trained for; None for a method's name, or if it was not saved.

    Raises:
        UserError: If there is no such editor, or it is damaged.
    """
    if str(source) in editor_names() or not is_place(str(source)):
        return None
    name = read_editor(find_editor(source)).made_for.get("lm")
    return str(name) if name else None


def any_editor(source: str | Path, lm: FrozenLM, options: Mapping[str, Any] | None = None) -> Editor:
    """Returns an editor that is ready to edit: a method that needs no training, or a trained editor.

    Args:
        source: The method's name, or a source that `load_editor` accepts.
        lm: The model that it edits.
        options: Hyper-parameters; of a trained editor those that may change after training.

    Raises:
        UserError: If there is no such editor, the method must be trained first, or an option is unknown or was fixed by
            training.
    """
    name = str(source)
    if name not in editor_names() and is_place(name):
        editor = load_editor(source, lm)
        adjust(editor, options or {})
        return editor
    method = build_editor(name, lm, **options or {})
    if method.trainable:
        raise UserError(f"editor {name!r} must be trained first: give a run's folder, id or name, or latest")
    return method
