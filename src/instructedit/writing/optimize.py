"""Improvement of descriptions by trial: a language model revises them by their scores, and better revisions are kept.

Only the leak check of `Rules` sees test records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from instructedit.errors import UserError
from instructedit.instructions import Description, InstructionBank, Split
from instructedit.writing import prompts
from instructedit.writing.card import TaskCard
from instructedit.writing.checks import Rules
from instructedit.writing.clients import Writer
from instructedit.writing.files import read_json, write_json
from instructedit.writing.generate import provenance
from instructedit.writing.ledger import BudgetSpentError
from instructedit.writing.trial import Measured, Trial, Verdict, compared

if TYPE_CHECKING:
    from instructedit.tracking import MLflowTracker

_REFUSED = 12  # refused revisions that the writer's prompt lists
_TAG = "round"  # tag of a round's run
_ROUNDS, _BUDGET = "the rounds are over", "the budget is spent"


@dataclass(frozen=True)
class Search:
    """Settings of a search: how long it goes on, and which descriptions it improves.

    Attributes:
        rounds: Maximum number of rounds.
        patience: Number of rounds without an improvement after which to stop.
        revisions: Number of revisions to ask for in a round.
        split: Which descriptions are improved; the others stay as they are.
        seed: Seed of the questions and of the bootstrap.

    Raises:
        UserError: If a number is not positive.
    """

    rounds: int = 10
    patience: int = 2
    revisions: int = 5
    split: Split = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "patience", "revisions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class State:
    """State of a search, saved after every measurement and every round.

    Attributes:
        identity: What the search's figures depend on.
        descriptions: Id → text of the descriptions that are improved.
        rounds: What happened in each round; round 0 measures the original descriptions.
        stale: Rounds since the last improvement.
        refused: Revisions that were not kept, with the reasons.
        measured: Text → metric → record → value, and failures.
        parent: Id of the search's MLflow run.
        stopped: Why the search is over; empty until then.
    """

    identity: dict[str, Any]
    descriptions: dict[str, str]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    stale: int = 0
    refused: list[str] = field(default_factory=list)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    parent: str | None = None
    stopped: str = ""

    @classmethod
    def load(cls, file: Path, identity: dict[str, Any], descriptions: dict[str, str]) -> Self:
        """Loads the state from a file, or makes a new one if there is no file.

        Raises:
            UserError: If the file is damaged, or of another search.
        """
        kept = read_json(file)
        if kept is None:
            return cls(identity, descriptions)
        try:
            state = cls(**kept)
        except TypeError as error:
            raise UserError(f"{file}: not the state of a search; remove it, or give --force true") from error
        if changed := [name for name in identity if state.identity.get(name) != identity[name]]:
            raise UserError(
                f"{file}: is of another search ({', '.join(changed)} differ); choose another --work, or --force true"
            )
        return state


@dataclass
class Optimizer:
    """The search for better descriptions (Figure 2 of the paper: the trial editor's metrics go back to the writer).

    A revision replaces a description only if it is better by the paired bootstrap (`compared`).

    Attributes:
        card: The task's card.
        bank: The task's descriptions.
        writer: The writer that revises them.
        rules: Rules that every revision must satisfy.
        trial: Measures descriptions on validation records.
        search: Settings of the search.
        folder: Folder of the state; an interrupted search goes on from there.
        root: Folder of the MLflow store.
    """

    card: TaskCard
    bank: InstructionBank
    writer: Writer
    rules: Rules
    trial: Trial
    search: Search
    folder: Path
    root: Path

    def __post_init__(self) -> None:
        own = {d.id: d.text for d in self.bank.split(self.search.split)}
        if not own:
            raise UserError(f"task {self.bank.task} has no {self.search.split} descriptions to improve")
        for name, text in own.items():
            if problem := self.rules.problem(text):
                raise UserError(f"description {name!r} {problem}")
        identity = {
            "task": self.card.task, "bank": own, "model": self.writer.model.name, "prompt": prompts.VERSION,
            "search": asdict(self.search) | {"rounds": None},  # a search may be given more rounds
            "trial": dict(self.trial.identity),
        }  # fmt: skip
        self.state = State.load(self.folder / "state.json", identity, dict(own))
        if self.state.stopped in (_ROUNDS, _BUDGET):
            self.state.stopped = ""

    def run(self) -> InstructionBank:
        """Runs the search until nothing improves any more, or the rounds or the budget are used up.

        Returns:
            The bank with the revisions that were kept; a revised description has an id of its own.

        Raises:
            UserError: If the model gives no usable reply; the state is kept.
        """
        from instructedit.tracking import MLflowTracker

        name = f"optimize/{self.card.task}"
        tracker = MLflowTracker(
            run_name=name, root=self.root, run_id=self.state.parent, tags={"experiment": "instructions"}
        )
        with tracker:
            if self.state.parent is None:
                self.state.parent = tracker.run_id
                tracker.log_hyperparams(
                    {"task": self.card.task, "model": self.writer.model.name, **asdict(self.search)}
                )
                self._save()
            if not self.state.rounds:
                self._finish({"proposed": 0, "refused": [], "tried": [], "kept": 0}, tracker)
            while not self._over():
                try:
                    done = self._round(len(self.state.rounds))
                except BudgetSpentError:
                    self.state.stopped = _BUDGET
                    break
                self._finish(done, tracker)
            self._save()
            self._report(tracker)
        return self.found()

    def found(self) -> InstructionBank:
        """Returns the bank with all revisions that were kept so far."""
        old = {d.id: d for d in self.bank.descriptions}
        born = {change["id"]: change["round"] for change in self.changes()}

        def now(d: Description) -> Description:
            if d.id not in born:
                return d
            return Description(f"{d.id}-r{born[d.id]}", d.split, self.state.descriptions[d.id])

        texts = tuple(now(d) for d in old.values())
        return InstructionBank(self.bank.task, texts, provenance(self.writer, self.search.seed))

    @property
    def improved(self) -> bool:
        """True if any revision was kept."""
        return any(True for _ in self.changes())

    def figures(self) -> list[dict[str, Any]]:
        """Lists rows of ``round, metric, mean, low, high``, ×100: of all descriptions together, with 95 % intervals."""
        return [row for done in self.state.rounds for row in done["figures"]]

    def changes(self) -> Iterator[dict[str, Any]]:
        """Yields the revisions that were kept, ``id, text, round, …``, in order."""
        for number, done in enumerate(self.state.rounds):
            yield from ({**tried, "round": number} for tried in done["tried"] if tried["kept"])

    def _over(self) -> bool:
        if self.state.stale >= self.search.patience:
            self.state.stopped = f"nothing improved for {self.search.patience} rounds"
        elif len(self.state.rounds) > self.search.rounds:
            self.state.stopped = _ROUNDS
        return bool(self.state.stopped)

    # -- a round --------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> dict[str, Any]:
        usable: list[tuple[str, str]] = []
        refused: list[str] = []
        proposed = self._proposals(number)
        for name, text in proposed:
            if problem := self._problem(name, text, [other for _, other in usable]):
                refused.append(f"{text!r} {problem}")
            else:
                usable.append((name, text))
        tried: list[tuple[str, str, Verdict]] = []
        for name, text in usable:
            pair = self._measure(text), self._measure(self.state.descriptions[name])
            tried.append((name, text, compared(*pair, self.trial.clusters, len(usable), self.search.seed)))
        best: dict[str, tuple[float, str]] = {}
        for name, text, verdict in tried:
            if verdict.better:
                best[name] = max(best.get(name, (verdict.score, text)), (verdict.score, text))
        rows = []
        for name, text, verdict in tried:
            kept = name in best and best[name][1] == text
            rows.append({"id": name, "text": text, "kept": kept, "verdict": asdict(verdict)})
            if not kept:
                refused.append(f"{text!r} in place of {name}: {verdict}")
        for name, (_, text) in best.items():
            self.state.descriptions[name] = text
        return {"proposed": len(proposed), "refused": refused, "tried": rows, "kept": len(best)}

    def _proposals(self, number: int) -> list[tuple[str, str]]:
        """Asks the writer for revisions and returns the (id, text) of each."""
        count, texts = self.search.revisions, self.state.descriptions
        seed = self.search.seed * 10_000 + number * 100
        question = prompts.revision(self.card, count, seed, self._account(), self.state.refused[-_REFUSED:])
        if not self.writer.model.structured:  # the worst first: a model that gives a list names no ids
            worst = sorted(texts, key=lambda name: self._worth(texts[name]))
            lines = prompts.listed_lines(self.writer.ask(question))[:count]
            return list(zip((worst * count)[:count], lines, strict=False))

        def check(found: prompts.Revisions) -> str | None:
            unknown = [r.id for r in found.revisions if r.id not in texts]
            return f"names the unknown id {unknown[0]!r}" if unknown else None

        found = prompts.asked(self.writer, question, prompts.Revisions, check)
        return [(r.id, " ".join(r.text.split())) for r in found.revisions[:count]]

    def _problem(self, name: str, text: str, beside: Sequence[str]) -> object:
        """Returns what is wrong with a revision, which may resemble what it replaces but no other description."""
        replaced = self.bank.get(name).text if self.state.descriptions[name] == self.bank.get(name).text else ""
        others = [d.text for d in self.bank.descriptions if d.text != replaced and d.id not in self.state.descriptions]
        others += [other for id_, other in self.state.descriptions.items() if id_ != name]
        if text == self.state.descriptions[name]:
            return "is what it should replace"
        return self.rules.problem(text, [*others, *beside])

    def _measure(self, text: str) -> Measured:
        if text not in self.state.measured:
            self.state.measured[text] = asdict(self.trial.measure(text))
            self._save()
        kept = self.state.measured[text]
        return Measured(kept["values"], tuple(kept["failures"]))

    def _worth(self, text: str) -> float:
        measured = self._measure(text)
        return sum(measured.mean(metric, self.trial.clusters) for metric in measured.values)

    def _account(self) -> str:
        """Lists the descriptions with their figures, and the failures of the worst one."""
        lines = []
        for name, text in self.state.descriptions.items():
            measured = self._measure(text)
            figures = ", ".join(f"{m} {measured.mean(m, self.trial.clusters):.1f}" for m in measured.values)
            lines.append(f"- {name}: {text!r}: {figures}")
        worst = min(self.state.descriptions, key=lambda name: self._worth(self.state.descriptions[name]))
        failures = self._measure(self.state.descriptions[worst]).failures
        return "\n".join(
            [*lines, f"Failures with {worst}:", *(f"- {line}" for line in failures)] if failures else lines
        )

    # -- state and logs -------------------------------------------------------------------------------------------

    def _finish(self, done: dict[str, Any], tracker: MLflowTracker) -> None:
        """Logs a round as a run of its own and adds it to the state."""
        number = len(self.state.rounds)
        done["figures"] = [{"round": number, **row} for row in self._figures()]
        done["ledger"] = self.writer.ledger.counts()
        self._log(number, done, tracker)
        self.state.rounds.append(done)
        self.state.refused += done["refused"]
        if number:
            self.state.stale = 0 if done["kept"] else self.state.stale + 1
        self._save()

    def _figures(self) -> Iterator[dict[str, Any]]:
        from instructedit.metrics import bootstrap_interval

        every = [self._measure(text).values for text in self.state.descriptions.values()]
        for metric, first in every[0].items():
            records = [r for r in first if all(r in values[metric] for values in every)]
            means = [sum(values[metric][r] for values in every) / len(every) for r in records]
            interval = bootstrap_interval(means, [self.trial.clusters[r] for r in records], seed=self.search.seed)
            yield {"metric": metric} | {k: 100 * getattr(interval, k) for k in ("mean", "low", "high")}

    def _log(self, number: int, done: Mapping[str, Any], tracker: MLflowTracker) -> None:
        from instructedit.tracking import MLflowTracker

        wanted = f"tags.{_TAG} = '{number}' and tags.`mlflow.parentRunId` = '{tracker.run_id}'"
        wanted += " and attributes.status = 'FINISHED'"
        if tracker.experiment.search_runs([tracker.experiment_id], wanted):
            return  # the search was interrupted after this run and before its state was saved
        tags = {"experiment": "instructions", _TAG: str(number)}
        name = f"optimize/{self.card.task}/round-{number}"
        with MLflowTracker(run_name=name, root=self.root, parent_run_id=tracker.run_id, tags=tags) as child:
            metrics = {f"val/{row['metric']}": row["mean"] for row in done["figures"]}
            metrics |= {name: float(done[name]) for name in ("proposed", "kept")}
            metrics |= {f"ledger/{name}": float(count) for name, count in done["ledger"].items()}
            child.log_metrics(metrics, step=number)
            child.log_json({**done, "descriptions": self.state.descriptions}, "round")

    def _report(self, tracker: MLflowTracker) -> None:
        from instructedit.drawing import save_figure
        from instructedit.writing.figure import metric_by_round

        figure = metric_by_round(self.figures(), f"{self.bank.task}: descriptions on validation records")
        for file in save_figure(figure, self.folder / "metrics"):
            tracker.log_file(file, "figures")
        tracker.log_json({"stopped": self.state.stopped, "ledger": self.writer.ledger.counts()}, "search")

    def _save(self) -> None:
        write_json(self.folder / "state.json", asdict(self.state))
