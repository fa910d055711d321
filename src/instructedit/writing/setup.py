"""Setup that both commands need before a language model is asked: the task's card and rules, the writer, the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from instructedit.console import console
from instructedit.errors import UserError
from instructedit.tasks import load_records, task_title
from instructedit.writing.card import TaskCard
from instructedit.writing.checks import Rules, Terms, others_descriptions
from instructedit.writing.clients import Writer
from instructedit.writing.ledger import Ledger
from instructedit.writing.optimize import Optimizer
from instructedit.writing.trial import Verdict


@dataclass(frozen=True)
class Subject:
    """A task to be described: its card, and the rules for its descriptions.

    Attributes:
        card: What the writer is told, with examples from training records.
        rules: Rules that descriptions must satisfy, with the terms of test records.
    """

    card: TaskCard
    rules: Rules

    @classmethod
    def load(cls, task: str, source: str, about: str | None, seed: int) -> Self:
        """Makes a task's card and rules from its training and test records.

        Raises:
            UserError: If there is no such task or source, or nothing says what it edits.
        """
        title = task_title(task)
        card = TaskCard.make(task, title, load_records(task, source, "train")[0], about, seed=seed)
        test, shown = Terms.of(load_records(task, source, "test")[0]), Terms.of(card.examples)
        return cls(card, Rules(frozenset(card.slots), test, shown, others_descriptions(task)))

    def __str__(self) -> str:
        """Summarises in one line what the leak check looks for."""
        test = self.rules.test
        return (
            f"{self.card.title}: descriptions are checked for {len(test.phrases)} terms of {test.records} test records"
            + (f" ({test.too_short} are too short to look for)" if test.too_short else "")
        )


def writer(
    model: str, ledger: Ledger, cache: str | None, base_url: str | None, key_env: str, temperature: float | None,
    timeout: float, **limits: Any,
) -> Writer:  # fmt: skip
    """Creates the writer that the commands' options ask for, with a cache on disk."""
    from instructedit.paths import cache_folder

    folder = Path(cache) if cache else cache_folder() / "instructions"
    return Writer.open(model, ledger, base_url, key_env, temperature, timeout, folder, **limits)


def bank_file(task: str, out: str | None, overwrite: bool, suffix: str = "") -> Path:
    """Returns the file to which the bank will be written; checked before anything is spent.

    Raises:
        UserError: If the file exists already and may not be overwritten.
    """
    file = Path(out or f"outputs/instructions/{task}{suffix}.yaml")
    if file.exists() and not overwrite:
        raise UserError(f"{file}: is there already; give another --out, or --overwrite true")
    return file


def show_rounds(optimizer: Optimizer) -> None:
    """Prints what each round proposed and kept, the figures of the bank, and why the search stopped."""
    from rich.table import Table

    state = optimizer.state
    metrics = list(dict.fromkeys(row["metric"] for row in optimizer.figures()))
    table = Table("round", "proposed", "not allowed", "tried", "kept", *metrics)
    for number, done in enumerate(state.rounds):
        figures = [f"{row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}]" for row in done["figures"]]
        counts = (number, done["proposed"], done["proposed"] - len(done["tried"]), len(done["tried"]), done["kept"])
        table.add_row(*map(str, counts), *figures)
    console().print(table)
    for line in state.refused:
        console().print(f"not kept: {line}", markup=False, highlight=False)
    for change in optimizer.changes():
        line = f"kept: {change['id']} is now {change['text']!r}: {Verdict(**change['verdict'])}"
        console().print(line, markup=False, highlight=False)
    print(f"stopped: {state.stopped}")
