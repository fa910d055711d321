"""Output of an experiment: files in its folder, artifacts of its run, and the results page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from instructedit.console import console, report_error
from instructedit.drawing import save_figure
from instructedit.experiments.results import Results
from instructedit.experiments.scores import FILE as SCORES
from instructedit.experiments.scores import write_scores
from instructedit.experiments.sections.base import PACKAGE, Panel, Section
from instructedit.registry import plugin

if TYPE_CHECKING:
    from pathlib import Path

    from instructedit.experiments.plan import Plan
    from instructedit.tracking import MLflowTracker

_NOTE = "mlflow.note.content"  # tag with a run's description in MLflow's UI
_LONGEST_NOTE = 8000  # largest number of characters in an MLflow tag


def report(experiment: Plan, results: Results, parent: MLflowTracker, failures: Sequence[str] = ()) -> list[str]:
    """Writes, logs and prints the output of each section, and the page with all of it.

    Args:
        experiment: The plan that was run.
        results: Its results.
        parent: The experiment's own run.
        failures: Earlier failures, to be shown on the page.

    Returns:
        Failures of this step; a section that fails does not stop the others.
    """
    out, panels, failed = console(), [], []
    experiment.out.mkdir(parents=True, exist_ok=True)
    write_scores(results.tables, results.titles, experiment.out / SCORES)
    parent.log_file(experiment.out / SCORES)
    for name in results.grid.sections:
        try:
            for each in plugin(Section, PACKAGE, name)().show(results):
                _keep(each, experiment.out, parent)
                panels.append(each)
                if each.terminal is not None:
                    out.print(each.terminal, each.note, markup=False, highlight=False)
        except Exception as error:  # any error, as for rows
            report_error(f"section {name!r}", error)
            failed.append(name)
    every = len(results.grid.sections)
    own = [f"{len(failed)} of {every} sections failed, see above: {', '.join(failed)}"] if failed else []
    try:
        _keep_page(experiment, results, panels, [*failures, *own], parent)
    except Exception as error:
        report_error("results page", error)
        own.append("the results page failed, see above")
    out.print(
        f"\nresults page: {experiment.out}/index.html   runs: "
        f"mlflow ui --backend-store-uri sqlite:///{experiment.root}/mlflow.db   (under Model training)",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return own


def _keep(panel: Panel, out: Path, parent: MLflowTracker) -> None:
    """Writes the files of a panel to `out` and logs them as artifacts."""
    if panel.markdown is not None:
        file = out / f"{panel.name}.md"
        file.write_text("\n\n".join(filter(None, [f"# {panel.title}", panel.note, panel.markdown])))
        parent.log_file(file)
    if panel.frame is not None:
        panel.frame.to_csv(out / f"{panel.name}.csv", index=False)
        parent.log_table(panel.frame, panel.name)
    if panel.figure is not None:
        for file in save_figure(panel.figure, out / panel.name):
            parent.log_file(file, "figures")
    for name, text in panel.files.items():
        (out / name).write_text(text)
        parent.log_file(out / name)


def _keep_page(
    experiment: Plan, results: Results, panels: list[Panel], failures: list[str], parent: MLflowTracker
) -> None:
    from instructedit.experiments.page import page

    file = experiment.out / "index.html"
    file.write_text(page(experiment, results, panels, failures, parent))
    parent.log_file(file)
    tables = [f"## {each.title}\n\n{each.note}\n\n{each.markdown}" for each in panels if each.markdown is not None]
    address = f"#/experiments/{parent.experiment_id}/runs/{parent.run_id}/artifacts/index.html"
    # The link comes first: MLflow collapses all but the first lines.
    note = "\n\n".join([f"[results page]({address})", f"# {results.grid.title}", results.grid.note, *tables])
    parent.experiment.set_tag(parent.run_id, _NOTE, note[:_LONGEST_NOTE])
