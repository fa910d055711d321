"""Loader of registered editors for MLflow: ``mlflow.pyfunc.load_model("models:/instructedit-tiny/1")``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructedit.editors import Editor, load_editor
from instructedit.editors.saved import read_folder
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.records import EditRequest
from instructedit.registered import INPUTS, MAX_NEW_TOKENS, OUTPUTS

if TYPE_CHECKING:
    from pandas import DataFrame


class EditedWords:
    """MLflow model that makes the edit in each row of a table and returns the LM's output before and after it.

    Args:
        editor: A trained editor, bound to its model.
    """

    def __init__(self, editor: Editor) -> None:
        self.editor = editor

    def predict(self, model_input: DataFrame, params: Mapping[str, Any] | None = None) -> DataFrame:
        """Makes the edit in each row and generates greedily before and after it.

        Args:
            model_input: Columns ``prompt`` and ``target``; ``task`` if the editor reads instructions; ``ask``, what
                the model is asked, by default the prompt.
            params: ``max_new_tokens`` (10).

        Returns:
            Columns ``ask, before, after``.

        Raises:
            UserError: If a column is missing, or a row is not a request that the editor accepts.
        """
        from pandas import DataFrame

        if missing := [name for name, needed in INPUTS.items() if needed and name not in model_input]:
            raise UserError(f"no column {missing[0]!r}; there are: {', '.join(map(str, model_input))}")
        rows = model_input.astype(object).where(model_input.notna(), None).to_dict("records")
        requests = [EditRequest(row["prompt"], row["target"], task=row.get("task")) for row in rows]
        asked = [row.get("ask") or row["prompt"] for row in rows]
        count = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
        lm = self.editor.lm
        words = [lm.generate(asked, count), lm.generate(asked, count, self.editor.edit(requests))]
        return DataFrame(dict(zip(OUTPUTS, [asked, *words], strict=True)))


def _load_pyfunc(path: str) -> EditedWords:
    """Loads a logged editor with the model that it was trained for; MLflow calls this by name."""
    lm = FrozenLM.from_pretrained(read_folder(Path(path)).made_for["lm"])
    return EditedWords(load_editor(path, lm))
