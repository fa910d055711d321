"""Instruction banks: the descriptions of each task, read from the YAML files in ``banks/`` and validated."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from instructedit.configs import load_yaml
from instructedit.errors import UserError

Split = Literal["train", "heldout", "unseen"]

SPLITS: tuple[str, ...] = get_args(Split)
#: The slots of the paper (Table 2). A bank that needs others lists them under ``slots:``.
SLOTS: tuple[str, ...] = ("LABEL", "TOPIC")
#: Anything in square brackets is a slot, so that misspelt ones are detected.
SLOT = re.compile(r"\[([^\[\]]*)\]")
VERSION = 1
BANKS = Path(__file__).parent / "banks"
#: Banks of tasks that are not packaged, by the task's name (see `add_bank`).
_ADDED: dict[str, InstructionBank] = {}


@dataclass(frozen=True)
class Description:
    """One wording of the description of a task (Section 4.1).

    Attributes:
        id: Unique within its bank; used in results.
        split: ``train`` to train on, ``heldout`` to test with, ``unseen`` for the transfer test of Figure 3.
        text: One sentence, with its slots still in square brackets.
    """

    id: str
    split: Split
    text: str

    @property
    def slots(self) -> frozenset[str]:
        """Names of the slots in the text."""
        return frozenset(SLOT.findall(self.text))


@dataclass(frozen=True)
class Provenance:
    """The provenance of a bank's descriptions, if a language model wrote them.

    Attributes:
        model: Name of the model.
        prompt: Version of the prompts that it was given.
        date: Day, as YYYY-MM-DD.
        seed: Seed of the prompts and of the choice of splits.
    """

    model: str
    prompt: str
    date: str
    seed: int


@dataclass(frozen=True)
class InstructionBank:
    """All descriptions of one task (Section 4.1: ten per task, of which one is held out; five more for Figure 3).

    Attributes:
        task: The task's title, as instructions show it.
        descriptions: In the order of the file.
        provenance: Their origin, if the file states it.
    """

    task: str
    descriptions: tuple[Description, ...]
    provenance: Provenance | None = None

    @classmethod
    def load(cls, path: str | Path) -> InstructionBank:
        """Reads a bank from a YAML file.

        Raises:
            UserError: If the file cannot be read or breaks a rule; the message names the file and the field.
        """
        raw = _read(Path(path))
        _check_version(raw, str(path))
        entries = _field(raw, "descriptions", list, str(path))
        if not entries:
            raise UserError(f"{path}: descriptions must not be empty")
        bank = cls(
            _field(raw, "task", str, str(path)),
            tuple(_description(entry, f"{path}: descriptions[{i}]") for i, entry in enumerate(entries)),
            _provenance(raw, str(path)),
        )
        _check_unique(bank.descriptions, str(path))
        _check_slots(bank.descriptions, _declared_slots(raw, str(path)), str(path))
        return bank

    @classmethod
    def for_task(cls, name: str) -> InstructionBank:
        """Returns the bank of a task: one that was added, or else the packaged one, whose file has the task's name.

        Raises:
            UserError: If there is none (the message lists the existing ones), or its file is invalid.
        """
        return _ADDED.get(name) or _packaged(name.lower())

    def split(self, name: Split) -> tuple[Description, ...]:
        """Returns the descriptions of one split; empty if the bank has none.

        Raises:
            UserError: If there is no such split.
        """
        check_split(name)
        return tuple(d for d in self.descriptions if d.split == name)

    def get(self, description_id: str) -> Description:
        """Returns the description with the given id or number: ``10`` is the tenth in any task's bank.

        Raises:
            UserError: If the bank has none; the message lists those it has.
        """
        for number, description in enumerate(self.descriptions, 1):
            if description_id in (description.id, str(number)):
                return description
        ids = ", ".join(d.id for d in self.descriptions)
        raise UserError(f"task {self.task} has no description {description_id!r}; there are: {ids}")

    def draw(self, rng: random.Random, split: Split = "train") -> Description:
        """Draws one description of the split, all equally likely.

        Raises:
            UserError: If the split is unknown or empty.
        """
        pool = self.split(split)
        if not pool:
            raise UserError(f"task {self.task} has no {split} descriptions")
        return rng.choice(pool)


def add_bank(task: str, bank: InstructionBank) -> None:
    """Registers a custom task's bank under the task's name in this process, replacing any earlier one."""
    _ADDED[task] = bank


def bank_names() -> tuple[str, ...]:
    """Returns the sorted names of the tasks that have a bank, packaged or added."""
    return tuple(sorted({path.stem for path in BANKS.glob("*.yaml")} | _ADDED.keys()))


def check_split(name: str) -> None:
    """Raises an error if a name is not a split.

    Raises:
        UserError: If there is no such split; the message lists the existing ones.
    """
    if name not in SPLITS:
        raise UserError(f"unknown split {name!r}; one of {', '.join(SPLITS)}")


@cache  # every edit of a run asks for its bank
def _packaged(name: str) -> InstructionBank:
    # Looked up in the listing rather than opened by name, so that a name with slashes finds nothing.
    if name not in bank_names():
        raise UserError(
            f"no instruction bank for task {name!r}; there are: {', '.join(bank_names())} (a task folder's task.yaml "
            "names its own under 'bank:')"
        )
    return InstructionBank.load(BANKS / f"{name}.yaml")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold the keys task, version and descriptions")
    return raw


def _field(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """Returns a key's value, of the right type and, if text, not blank; white space becomes single spaces."""
    if key not in raw:
        raise UserError(f"{where}: missing key {key!r}")
    value = raw[key]
    if kind is str and isinstance(value, str):
        value = " ".join(value.split())  # each part of an instruction is one line
        if not value:
            raise UserError(f"{where}: {key} is empty")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {key} must be of type {kind.__name__}, got {value!r}")
    return value


def _description(entry: object, where: str) -> Description:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must hold the keys id, split and text, got {entry!r}")
    description = Description(*(_field(entry, key, str, where) for key in ("id", "split", "text")))
    if description.split not in SPLITS:
        raise UserError(f"{where}: unknown split {description.split!r}; one of {', '.join(SPLITS)}")
    return description


def _provenance(raw: Mapping[str, Any], where: str) -> Provenance | None:
    if "provenance" not in raw:
        return None
    own = _field(raw, "provenance", dict, where)
    kinds = {"model": str, "prompt": str, "date": str, "seed": int}
    found = Provenance(**{key: _field(own, key, kind, f"{where}: provenance") for key, kind in kinds.items()})
    try:
        date.fromisoformat(found.date)
    except ValueError as error:
        raise UserError(f"{where}: provenance: date must be a day as YYYY-MM-DD, got {found.date!r}") from error
    return found


def _check_version(raw: Mapping[str, Any], where: str) -> None:
    if (version := _field(raw, "version", int, where)) != VERSION:
        raise UserError(f"{where}: version {version} is not supported, only {VERSION}")


def _check_unique(descriptions: Sequence[Description], where: str) -> None:
    ids: set[str] = set()
    texts: dict[str, str] = {}
    for d in descriptions:
        if d.id in ids:
            raise UserError(f"{where}: duplicate id {d.id!r}")
        ids.add(d.id)
        # Wordings that differ in case or punctuation alone would leak a held-out description into training.
        words = " ".join(re.findall(r"\w+", d.text.casefold()))
        if words in texts:
            raise UserError(f"{where}: text of {d.id!r} repeats that of {texts[words]!r}")
        texts[words] = d.id


def _declared_slots(raw: Mapping[str, Any], where: str) -> frozenset[str]:
    declared = _field({"slots": [], **raw}, "slots", list, where)
    if not all(isinstance(slot, str) and slot.strip() for slot in declared):
        raise UserError(f"{where}: slots must be a list of names, got {declared!r}")
    return frozenset(declared)


def _check_slots(descriptions: Sequence[Description], declared: frozenset[str], where: str) -> None:
    for d in descriptions:
        if unknown := d.slots - declared.union(SLOTS):
            raise UserError(f"{where}: text of {d.id!r} has the unknown slot [{min(unknown)}]")
    used = declared.union(*(d.slots for d in descriptions))
    for d in descriptions:
        if missing := used - d.slots:
            raise UserError(f"{where}: text of {d.id!r} lacks the slot [{min(missing)}]")
