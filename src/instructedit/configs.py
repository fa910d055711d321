"""Lookup of config files by name: those of a scale, of an editor at that scale, and of the other groups in configs/."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from instructedit import paths
from instructedit.errors import UserError, unknown

T = TypeVar("T")

_LARGEST = 1_000_000  # values that a file may expand to
SCALE, EDITOR, TASK, CONFIG = "--scale", "--editor", "--task", ("--config", "-c")

#: Folders of ``configs/`` with an option of the same name, for settings that all scales share.
GROUPS = ("callbacks", "logger", "debug")


@dataclass(frozen=True)
class Scale:
    """A language model with its trainer, data and editor configs, read from ``configs/scale/`` or a user's own file.

    Its keys name files of ``configs/<key>/`` without their suffix, or give a path that ends in ``.yaml`` and is
    relative to the scale's own file.

    Attributes:
        file: The scale's own file, which names the rest.
        lm: Config of the language model.
        trainer: Config of the training: steps, batches, device.
        data: Configs of the data, in order.
        editors: Folders with this scale's variants of editors, in order: names in ``configs/editor/``, or paths with a
            slash, relative to the file. An editor that is in none of them uses its plain config.
        paper: The model whose published results are shown next to ours.
    """

    file: Path
    lm: str
    trainer: str
    data: tuple[str, ...]
    editors: tuple[str, ...] = ()
    paper: str | None = None

    @classmethod
    def load(cls, given: str | Path) -> Self:
        """Reads a scale by its name or by the path of its file.

        Raises:
            UserError: If there is no such scale, or a key is missing, unknown or of the wrong kind.
        """
        file = _named("scale", given, [_group("scale")])
        return parsed(cls, read_yaml(file), str(file), file=file)

    @classmethod
    def of_model(cls, lm: str) -> Self | None:
        """Loads the scale named after a model, with the hyper-parameters chosen for it; None if there is none."""
        return cls.load(lm) if lm in _names([_group("scale")]) else None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.file.stem

    @property
    def option(self) -> str:
        """Value of ``--scale`` that selects this scale: its name, or the path of a user's own file."""
        return self.name if self.file.parent == _group("scale") else str(self.file)

    def editor(self, name: str) -> Path:
        """Finds the config of an editor at this scale.

        Raises:
            UserError: If there is none of this name, or no such folder of variants.
        """
        return _named("editor", name, [*map(self._variants, self.editors), _group("editor")])

    def files(self, editor: str | None = None, more: Iterable[Path] = ()) -> list[Path]:
        """Lists the configs of a run in the order in which they are read: the last one that sets an option wins.

        Args:
            editor: Name or path of the editor's config; without it the files do not set an editor.
            more: Further configs, read before the editor's.

        Raises:
            UserError: If one of them does not exist.
        """
        named = (("lm", self.lm), ("trainer", self.trainer), *(("data", name) for name in self.data))
        own = [self._own(key, name) for key, name in named]
        return [*own, *more, *([self.editor(editor)] if editor else [])]

    def lm_options(self) -> dict[str, Any]:
        """Reads the LM's config: ``name``, and further arguments of `FrozenLM.from_pretrained`.

        Raises:
            UserError: If the config does not set an LM.
        """
        return _section(self._own("lm", self.lm), "model", "lm")

    def editor_options(self, name: str) -> dict[str, Any]:
        """Reads an editor's hyper-parameters at this scale, as `build_editor` takes them.

        Raises:
            UserError: If there is no such editor, or its config does not set one.
        """
        return dict(_section(self.editor(name), "model", "editor").get("init_args") or {})

    def _own(self, key: str, name: str) -> Path:
        try:
            return _named(f"{key} config", name, [_group(key)], self.file.parent)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error

    def _variants(self, folder: str) -> Path:
        found = self.file.parent / folder if "/" in folder else _group("editor") / folder
        if not found.is_dir():
            known = sorted(each.name for each in _group("editor").iterdir() if each.is_dir())
            raise UserError(f"{self.file}: editors: {unknown('folder', folder, known)}")
        return found


def config_files(scale: str | None, editor: str | None) -> list[Path]:
    """Lists the configs that a scale and an editor stand for; without a scale, the editor's plain config is used.

    Raises:
        UserError: If one of them does not exist.
    """
    if scale:
        return Scale.load(scale).files(editor)
    return [_named("editor", editor, [_group("editor")])] if editor else []


def expanded(args: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Replaces ``--scale``, ``--editor``, ``--task`` and `GROUPS` in a command line by what they stand for.

    Their configs are inserted right after the command, in this order, so that explicit configs and options override
    them. A task replaces all tasks that any of these configs name. Shipped configs are found by their path in the
    repository (``configs/lm/tiny.yaml``) from any working directory.

    Args:
        args: The command and its options.

    Returns:
        The new command line, and the files that the names stand for.

    Raises:
        UserError: If there is no such scale, editor or file, or a file is not YAML.
    """
    scale, rest = _taken(args, SCALE)
    editor, rest = _taken(rest, EDITOR)
    files = config_files(scale, editor)
    for group in GROUPS:
        name, rest = _taken(rest, f"--{group}")
        files += [_named(group, name, [_group(group)])] if name else []
    task, rest = _taken(rest, TASK)
    own = [f"--data.{part}={json.dumps([{'name': task}])}" for part in ("train", "val", "test")] if task else []
    rest = located(rest)
    return [*rest[:1], *(f"--config={file}" for file in files), *rest[1:], *own], files


def located(args: Sequence[str]) -> list[str]:
    """Checks that each ``--config`` is a YAML file, and finds the shipped ones from any working directory.

    Raises:
        UserError: If one is not.
    """
    left, found = iter(args), []
    for arg in left:
        name, equals, value = arg.partition("=")
        if name in CONFIG:
            path = value if equals else next(left, "")
            file = next((file for file in (Path(path), paths.SHARED / path) if file.is_file()), None)
            if file is None:
                raise UserError(f"--config {path}: no such file")
            content = read_yaml(file, "--config ")
            if not isinstance(content, dict):
                raise UserError(f"--config {path}: {'is empty' if content is None else 'expected keys and values'}")
            arg = f"--config={file}"
        found.append(arg)
    return found


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, of which the last would otherwise win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Parses YAML into plain values; rejects duplicate keys, and aliases that expand to more than a million values.

    Raises:
        yaml.YAMLError: If the text is not YAML, or too large or too deeply nested.
    """
    try:
        value = yaml.load(text, _UniqueKeys)
        _check_size(value, {})
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deep") from error
    except ValueError as error:  # an impossible date, or a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error
    return value


def _check_size(value: Any, known: dict[int, int]) -> int:
    """Counts the values that a value consists of; shared ones count once for each reference."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _LARGEST + 1  # for a value that contains itself
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_check_size(each, known) for each in inner)
    if known[id(value)] > _LARGEST:
        raise yaml.YAMLError(f"its aliases make more than {_LARGEST:,} values")
    return known[id(value)]


def read_yaml(file: Path, what: str = "") -> Any:
    """Reads a YAML file.

    Raises:
        UserError: If it is not YAML; the message has `what` before the file's name.
    """
    try:
        return load_yaml(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{what}{file}: not YAML: {error}") from error


def parsed(kind: type[T], spec: Any, where: str, **known: Any) -> T:
    """Builds a dataclass from plain data after checking the keys and the types of their values.

    Args:
        kind: The dataclass.
        spec: Its fields by name.
        where: Where the data come from, for error messages.
        known: Fields that are not among the keys, with their values.

    Raises:
        UserError: If a key is missing, unknown or of the wrong kind.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=set(known))
    try:
        if not isinstance(spec, dict):
            raise TypeError(f"expected keys and values, got {spec!r}")
        return kind(**vars(parser.instantiate(parser.parse_object(spec))), **known)
    except (ArgumentError, TypeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def shown(file: Path) -> str:
    """Shortens a config's path to one relative to the working directory or the repository, if it lies in either."""
    homes = (home for home in (Path.cwd(), paths.SHARED) if file.is_relative_to(home))
    return str(next((file.relative_to(home) for home in homes), file))


def _section(file: Path, *keys: str) -> dict[str, Any]:
    """Returns the part of a config file under the given nested keys."""
    part = read_yaml(file)
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    if not isinstance(part, dict):
        raise UserError(f"{file}: expected the keys {'.'.join(keys)}")
    return dict(part)


def _group(name: str) -> Path:
    return paths.SHARED / "configs" / name


def _named(kind: str, name: str | Path, folders: Sequence[Path], base: Path = Path()) -> Path:
    """Finds a file by its path (``.yaml``, relative to `base`), or by its name in the first folder that has it."""
    if str(name).endswith(".yaml"):
        file = base / Path(name).expanduser()
        if not file.is_file():
            raise UserError(f"{kind} {name}: no such file")
        return file.resolve()
    found = next((file for folder in folders if (file := folder / f"{name}.yaml").is_file()), None)
    if found is None:
        raise unknown(kind, str(name), sorted(set(_names(folders))))
    return found


def _names(folders: Iterable[Path]) -> Iterator[str]:
    return (file.stem for folder in folders for file in folder.glob("*.yaml"))


def _taken(args: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Returns a flag's value (from ``--flag VALUE`` or ``--flag=VALUE``) and the arguments without the flag."""
    left, value, rest = iter(args), None, []
    for arg in left:
        name, equals, given = arg.partition("=")
        if name != flag:
            rest.append(arg)
            continue
        value = given if equals else next(left, "")
        if not value:
            raise UserError(f"{flag}: expected a name or a file")
    return value, rest
