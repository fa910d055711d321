"""Experiments, which run a plan row by row and show its results section by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from instructedit.console import console, report_error
from instructedit.errors import UserError
from instructedit.experiments.plan import Plan
from instructedit.experiments.report import report
from instructedit.experiments.results import Results
from instructedit.experiments.runner import Runner, RunResult
from instructedit.experiments.search import search
from instructedit.experiments.sections import PACKAGE, Section
from instructedit.paths import check_database, check_writable
from instructedit.registry import plugins
from instructedit.stores import DATABASE

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.tracking import MLflowTracker


@dataclass(frozen=True)
class Experiment(Plan):
    """An experiment: a plan that can be run (see `load`)."""

    def __post_init__(self) -> None:
        known = plugins(Section, PACKAGE)
        for key, names in (("sections", self.grid.sections), ("options", self.grid.options)):
            if unknown := [name for name in names if name not in known]:
                raise UserError(f"{self.file}: {key}: no section {unknown[0]!r}; there are: {', '.join(known)}")

    def run(self) -> DataFrame:
        """Runs the search, then every row with every seed; then writes and logs the sections of the results page.

        A run that is already in the store, complete and with the same fingerprint, is not repeated.

        Returns:
            The summary: ``method, task, metric, mean, low, high, n, seeds, spread``.

        Raises:
            UserError: If the store or the folder of results cannot be written, before anything runs; or if rows or
                sections failed, after the results of the others have been written.
        """
        from instructedit.tracking import MLflowTracker

        check_database(check_writable(self.root, "--root") / DATABASE)
        check_writable(self.out, "--out")

        tags = {"experiment": self.name, "scale": self.scale.name, "seeds": ",".join(map(str, self.seeds))}
        with MLflowTracker(run_name=self.name, root=self.root, tags=tags) as parent:
            return self._run(Runner(self, parent))

    def _run(self, runner: Runner) -> DataFrame:
        trials, failures = None, []
        if self.grid.search:
            try:
                trials = search(self, runner.parent)
            except Exception as error:  # any error, as for rows
                report_error("search", error)
                failures = ["the search failed, see above"]
        done = [name for i, name in enumerate(self.rows, 1) if self._run_row(i, name, runner)]
        failed = [name for name in self.rows if name not in done]
        if failed:
            failures.append(f"{len(failed)} of {len(self.rows)} rows failed, see above: {', '.join(failed)}")
        # Collected only now, since a row that tests another may have caused the other's run to be repeated.
        found = {name: [runner.result(name, seed) for seed in self.seeds_of(name)] for name in done}
        if failed and not found:
            raise UserError("; ".join(failures))
        beside = self.tables_beside
        every = [runs[0].titles for runs in found.values()]
        every += [dict(zip(table["task"], table["title"], strict=True)) for table in beside.values()]
        titles = shared_titles(every)
        results = Results(self.name, self.grid, self.scale, found, self.published, titles, trials, beside)
        failures += report(self, results, runner.parent, failures)
        self._name_best(results, runner.parent)
        if failures:
            raise UserError("; ".join(failures))
        return results.summary

    def _name_best(self, results: Results, parent: MLflowTracker) -> None:
        """Tags the experiment's run with its best row, and prints how to edit with what that row trained.

        The best row has the highest mean over tasks and over the metrics that ``val/score`` consists of.
        """
        from instructedit.metrics import editing_metrics

        chosen_by = [name for name, metric in editing_metrics().items() if metric.chooses]
        summary = results.summary
        means = summary[summary["metric"].isin(chosen_by)].groupby("method")["mean"].mean()
        if means.empty:
            return
        best = str(means.idxmax())
        for key, value in (("best.row", best), ("best.score", f"{means[best]:.1f}")):
            parent.experiment.set_tag(parent.run_id, key, value)
        if best in results.rows and self.grid.rows[best].fitted:
            run = results.rows[best][0]
            folder = next(self.root.glob(f"*/{run.run_id}"), run.run_id)
            at = "" if self.scale.name == "tiny" else f" --scale {self.scale.option}"
            line = f'next: instructedit edit --editor {folder}{at} --prompt "The capital of France is" --target Rome'
            task = summary["task"].iloc[0]
            console().print(f"{line} --task {task}", markup=False, highlight=False, soft_wrap=True)

    def _run_row(self, number: int, name: str, runner: Runner) -> bool:
        """Runs a row with all seeds; returns False if that failed."""
        from rich.markup import escape

        console().rule(escape(f"row {number} of {len(self.rows)}: {name}"))
        try:
            results: list[RunResult] = [runner.result(name, seed) for seed in self.seeds_of(name)]
        except Exception as error:  # any: later rows may still succeed, for example if they need less memory
            report_error(f"row {name!r}", error)
            return False
        return bool(results)


def shared_titles(runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Merges the rows' task titles; a task that some rows held out and others trained on gets its plain title."""
    from instructedit.tasks import task_title

    every: dict[str, set[str]] = {}
    for titles in runs:
        for task, title in titles.items():
            every.setdefault(task, set()).add(title)
    return {task: found.pop() if len(found) == 1 else task_title(task) for task, found in every.items()}
