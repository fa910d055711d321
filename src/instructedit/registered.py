"""Trained editors as MLflow models: their folders load with ``mlflow.pyfunc``, and their names have versions."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from instructedit.run_names import NOTE

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: The module whose ``_load_pyfunc`` loads an editor's folder as a model.
LOADER = "instructedit.mlflow_model"
_EXAMPLE = "input_example.json"
#: Input columns of such a model, and whether they are required.
INPUTS = {"prompt": True, "target": True, "task": False, "ask": False}
OUTPUTS = ("ask", "before", "after")
#: New tokens of an answer, unless a call sets their number.
MAX_NEW_TOKENS = 10


def describe_model(folder: Path, run_id: str, example: dict[str, str]) -> None:
    """Writes MLflow's description of a model, and an example of its input, next to a saved editor's files.

    Args:
        folder: Folder of the saved editor.
        run_id: The run that it is logged in.
        example: A request, by the columns `INPUTS`.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        Schema([ColSpec("string", name, required=needed) for name, needed in INPUTS.items()]),
        Schema([ColSpec("string", name) for name in OUTPUTS]),
        ParamSchema([ParamSpec("max_new_tokens", "integer", MAX_NEW_TOKENS)]),
    )
    (folder / _EXAMPLE).write_text(json.dumps({"columns": list(example), "data": [list(example.values())]}, indent=2))
    shown = {"artifact_path": _EXAMPLE, "type": "dataframe", "pandas_orient": "split"}
    model = Model(folder.name, run_id, signature=signature, saved_input_example_info=shown)
    add_to_model(model, LOADER)
    model.save(str(folder / "MLmodel"))


def register(client: MlflowClient, name: str, run_id: str, folder: str) -> str | None:
    """Registers a logged editor as the next version of a registered model.

    Args:
        client: Client of the store.
        name: Name of the registered model, which is created if needed; characters that MLflow forbids become ``_``.
        run_id: The run that it is logged in.
        folder: Its folder among the run's artifacts.

    Returns:
        The version; None, with a warning, if the store has no registry.
    """
    from mlflow.exceptions import MlflowException

    name = re.sub(r"[^\w .-]", "_", name)
    try:
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="A knowledge editor; each version is a fit of its own.")
        run = client.get_run(run_id)
        source, note = f"{run.info.artifact_uri}/{folder}", run.data.tags.get(NOTE, "")
        return str(client.create_model_version(name, source, run_id, description=note).version)
    except MlflowException as error:
        warnings.warn(f"the editor is logged, but not registered: {str(error).splitlines()[0]}", stacklevel=2)
        return None
