"""What is on disk of a trained editor: what it is, its weights, and the model that it was trained for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from instructedit.editors.sources import CONFIG, WEIGHTS
from instructedit.errors import UserError
from instructedit.lm import FrozenLM


class SavedEditor(NamedTuple):
    """A trained editor as it lies on disk.

    Attributes:
        name: Registry name of the method, or in a checkpoint the name of its class.
        options: Its constructor arguments.
        weights: Name → tensor.
        made_for: What `made_for` said of the model; what an older version saved may lack any of it.
    """

    name: str
    options: dict[str, Any]
    weights: dict[str, Tensor]
    made_for: dict[str, Any]


def made_for(lm: FrozenLM, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """What an editor's weights fit: the model's name, its tokenizer, and site → [in, out]."""
    text = lm.text
    return {"lm": lm.name, "sites": dict(shapes), "tokenizer": text.fingerprint, "tokens": len(text.tokenizer)}


def check_made_for(saved: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Makes sure that an editor fits a model.

    Args:
        saved: What `made_for` said when the editor was saved.
        own: What it says of the model at hand.
        source: Where the editor is.

    Raises:
        UserError: If the model has another tokenizer, or its edited layers other names or sizes.
    """
    trained = f"{source}: this editor was trained for {saved.get('lm', 'another model')}"
    if saved.get("tokenizer", own["tokenizer"]) != own["tokenizer"]:
        raise UserError(
            f"{trained}, whose tokenizer ({saved.get('tokens')} tokens) is not that of {own['lm']} ({own['tokens']})"
        )
    theirs, ours = saved.get("sites", own["sites"]), own["sites"]
    for site in [*theirs, *ours]:
        if (there := theirs.get(site)) != (here := ours.get(site)):
            sizes = f"{_size(there)} there and {_size(here)} in {own['lm']}"
            raise UserError(f"{trained}: layer {site} is {sizes}: another shape of model")


def _size(shape: list[int] | None) -> str:
    return "not edited" if shape is None else " × ".join(map(str, shape))


def read_editor(place: Path) -> SavedEditor:
    """Reads a folder that `Editor.save_pretrained` wrote, or a checkpoint of a run.

    Raises:
        UserError: If it is damaged, or something else.
    """
    return _checkpoint(place) if place.is_file() else read_folder(place)


def read_folder(folder: Path) -> SavedEditor:
    """Reads a folder that `Editor.save_pretrained` wrote.

    Raises:
        UserError: If it holds no editor, or a damaged one.
    """
    try:
        card = json.loads((folder / CONFIG).read_text())
        name, options = card.pop("editor"), dict(card.pop("options"))
        return SavedEditor(name, options, load_file(folder / WEIGHTS), card)
    except Exception as error:
        raise UserError(f"{folder}: damaged editor: {error}") from error


def _checkpoint(file: Path) -> SavedEditor:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        config = saved["hyper_parameters"]["editor"]
        name = config["class_path"].rsplit(".", 1)[-1]
        weights = {k.removeprefix("editor."): v for k, v in saved["state_dict"].items() if k.startswith("editor.")}
        return SavedEditor(name, dict(config.get("init_args", {})), weights, dict(saved.get("made_for", {})))
    except Exception as error:
        raise UserError(f"{file}: not a checkpoint of an editor ({type(error).__name__}: {error})") from error
