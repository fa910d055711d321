"""Run a whole experiment: fit, test, tables, figures (`demo` is the main job)."""

from __future__ import annotations

from typing import Literal

POSITIONAL = True
RENAMED = {"fresh": "force"}


def main(
    name: str,
    scale: str = "tiny",
    data: Literal["real"] | None = None,
    seeds: list[int] | None = None,
    rows: list[str] | None = None,
    root: str = "mlruns",
    out: str | None = None,
    overrides: list[str] | None = None,
    force: bool = False,
    task: str | None = None,
    beside: list[str] | None = None,
) -> None:
    """Runs the rows of ``experiments/<name>/grid.yaml`` and compares them side by side.

    Runs in the store that are complete, and were made with the same options, configs and code, are used again, so that
    a killed experiment goes on where it stopped.

    Args:
        name: Name of the experiment's folder under experiments/.
        scale: LM and hyper-parameters: a file of configs/scale/ by its name, or a file of your own.
        data: real: the records of the real datasets, a folder for each task under data/; by default those of the scale.
        seeds: Seeds, with one run of every row for each; the grid's own by default.
        rows: Only these rows of the grid; [] for none, to join the scores of other experiments.
        root: Folder of the MLflow store.
        out: Folder for the results page, tables and figures; by default outputs/<name>, and at another scale
            outputs/<name>-<scale>.
        overrides: Further options for every run, e.g. '["--trainer.max_steps=20"]'.
        force: Run everything anew, for instance because a dataset or a local LM has changed.
        beside: Scores of experiments that were run elsewhere, files scores.csv.gz or their folders, to be shown and
            compared with these: further seeds of the same rows, or other methods on the same records.
        task: Train, validate and test every row on this one task instead: its name, or a folder with a task.yaml.
    """
    from instructedit.experiments import Experiment

    if task:
        from instructedit.configs import Scale
        from instructedit.tasks import task_name

        out = out or f"outputs/{name}-{Scale.load(scale).name}-{task_name(task)}"
        overrides = [*(overrides or []), f"--task={task}"]
    Experiment.load(name, scale, seeds, rows, root, out, overrides, force, data, beside).run()
