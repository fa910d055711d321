"""Reads and writes saved editors as checked plain values and tensors, without importing the code of any method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructedit.editors.sources import CONFIG, WEIGHTS
from instructedit.edits.checksums import CHECKSUM, check_sound, file_checksum, tensors_checksum
from instructedit.errors import UserError
from instructedit.lm import FrozenLM

_PREFIX = "editor."
_PARTS = ("state_dict", "optimizer_states", "training_state")  # the parts of a checkpoint that hold tensors


class SavedEditor(NamedTuple):
    """The contents of a trained editor on disk.

    Attributes:
        name: The method's name, or in a checkpoint the name of its class (the class's module is ignored).
        options: The constructor's arguments.
        weights: Name → tensor.
        made_for: Description of the model from `made_for`; entries may be missing if an older version saved it.
        parts: Names of everything in a checkpoint; empty for a folder.
    """

    name: str
    options: dict[str, Any]
    weights: dict[str, Tensor]
    made_for: dict[str, Any]
    parts: frozenset[str] = frozenset()


def made_for(lm: FrozenLM, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """Describes the model that an editor's weights fit: its name, its tokenizer, and site → [in, out]."""
    text = lm.text
    return {"lm": lm.name, "sites": dict(shapes), "tokenizer": text.fingerprint, "tokens": len(text.tokenizer)}


def check_made_for(saved: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Checks that an editor fits a model.

    Args:
        saved: Result of `made_for` when the editor was saved.
        own: Result of `made_for` for the current model.
        source: Source of the editor, for errors.

    Raises:
        UserError: If the model has another tokenizer, or its edited layers have other names or sizes.
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
    """Reads an editor from a folder that `Editor.save_pretrained` wrote, or from a checkpoint of a run.

    Raises:
        UserError: If it is damaged, or not an editor.
    """
    return read_checkpoint(place) if place.is_file() else read_folder(place)


def read_folder(folder: Path) -> SavedEditor:
    """Reads an editor from a folder that `Editor.save_pretrained` wrote.

    Raises:
        UserError: If the folder holds none, or a damaged one: one that has changed, or contains NaN or infinities.
    """
    try:
        card = json.loads((folder / CONFIG).read_text())
        name, options = str(card.pop("editor")), dict(card.pop("options"))
        saved = SavedEditor(name, options, load_file(folder / WEIGHTS), card)
        found = file_checksum(folder / WEIGHTS)
    except Exception as error:
        raise UserError(f"{folder}: damaged editor: {error}") from error
    check_sound(saved.weights, found, card.pop(CHECKSUM, None), str(folder))
    return saved


def write_folder(folder: Path, saved: SavedEditor, card: str) -> None:
    """Writes an editor to a folder for `read_folder`, with a model card."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in saved.weights.items()}, folder / WEIGHTS)
    facts = {"editor": saved.name, "options": saved.options, **saved.made_for}
    facts[CHECKSUM] = file_checksum(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "README.md").write_text(card, encoding="utf-8")


def upload(repo_id: str, private: bool, write: Callable[[str], None]) -> None:
    """Uploads the folder that `write` fills to a repository of the hub, which is created if necessary."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        api.upload_folder(repo_id=repo_id, folder_path=folder)


def read_checkpoint(file: Path) -> SavedEditor:
    """Reads an editor from a checkpoint that `fit` wrote.

    Raises:
        UserError: If it is not a checkpoint of an editor, or is damaged.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        config = saved["hyper_parameters"]["editor"]
        name, options = config["class_path"].rsplit(".", 1)[-1], dict(config.get("init_args") or {})
        check_checkpoint(saved, str(file))
        weights = {k.removeprefix(_PREFIX): v for k, v in saved["state_dict"].items() if k.startswith(_PREFIX)}
        fits = dict(saved.get("made_for", {}))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: not a checkpoint of an editor ({type(error).__name__}: {error})") from error
    return SavedEditor(name, options, weights, fits, frozenset(saved))


def seal_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Adds checksums of the editor's tensors and the optimiser's to a checkpoint that is about to be written."""
    checkpoint[CHECKSUM] = {part: tensors_checksum(_tensors(checkpoint[part])) for part in _PARTS if part in checkpoint}


def check_checkpoint(checkpoint: Mapping[str, Any], where: str) -> None:
    """Refuses a damaged checkpoint.

    Raises:
        UserError: If it has changed since it was saved, or contains tensors that are not finite.
    """
    expected = checkpoint.get(CHECKSUM) or {}
    for part in _PARTS:
        if part in checkpoint:
            tensors = _tensors(checkpoint[part])
            check_sound(tensors, tensors_checksum(tensors) if part in expected else "", expected.get(part), where)


def _tensors(part: Any) -> dict[str, Tensor]:
    """Collects the tensors in a part of a checkpoint, by their paths in it."""
    found: dict[str, Tensor] = {}
    todo = [("", part)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, Tensor):
            found[place] = value
        elif isinstance(value, Mapping):
            todo += [(f"{place}/{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(f"{place}/{i}", inner) for i, inner in enumerate(value)]
    return {place.removeprefix("/"): tensor for place, tensor in found.items()}
