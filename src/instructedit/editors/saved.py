"""Reads saved editors: plain values and tensors, checked, and the model that they fit; nothing is imported for it."""

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
_PARTS = ("state_dict", "optimizer_states")  # of a checkpoint, that hold tensors


class SavedEditor(NamedTuple):
    """A trained editor as it lies on disk.

    Attributes:
        name: The method's name, or in a checkpoint the name of its class (its module is not looked at).
        options: The constructor's arguments.
        weights: Name → tensor.
        made_for: What `made_for` said of the model; what an older version saved may lack any of it.
        parts: What else a checkpoint holds.
    """

    name: str
    options: dict[str, Any]
    weights: dict[str, Tensor]
    made_for: dict[str, Any]
    parts: frozenset[str] = frozenset()


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
    return read_checkpoint(place) if place.is_file() else read_folder(place)


def read_folder(folder: Path) -> SavedEditor:
    """Reads what `Editor.save_pretrained` wrote.

    Raises:
        UserError: If the folder holds none, or a damaged one: not what was saved, or with NaN or infinities.
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
    """Writes what `read_folder` reads, and a model card beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in saved.weights.items()}, folder / WEIGHTS)
    facts = {"editor": saved.name, "options": saved.options, **saved.made_for}
    facts[CHECKSUM] = file_checksum(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "README.md").write_text(card, encoding="utf-8")


def upload(repo_id: str, private: bool, write: Callable[[str], None]) -> None:
    """Makes a repository of the hub where there is none, and uploads the folder that `write` fills."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        api.upload_folder(repo_id=repo_id, folder_path=folder)


def read_checkpoint(file: Path) -> SavedEditor:
    """Reads the editor of a checkpoint that a fit wrote.

    Raises:
        UserError: If it is no checkpoint of an editor, or a damaged one.
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
        UserError: If it is not what was saved, or tensors in it are not finite.
    """
    expected = checkpoint.get(CHECKSUM) or {}
    for part in _PARTS:
        if part in checkpoint:
            tensors = _tensors(checkpoint[part])
            check_sound(tensors, tensors_checksum(tensors) if part in expected else "", expected.get(part), where)


def _tensors(part: Any) -> dict[str, Tensor]:
    """The tensors in a part of a checkpoint, by their places."""
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
