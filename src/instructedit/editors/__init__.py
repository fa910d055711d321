"""Editing methods: one file for each method, found by the ``name`` of its class."""

from instructedit.editors.base import Editor, build_editor, load_editor, load_weights
from instructedit.editors.choosing import any_editor, editor_names, lm_of

__all__ = ["Editor", "any_editor", "build_editor", "editor_names", "lm_of", "load_editor", "load_weights"]
