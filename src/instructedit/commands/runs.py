"""List the runs of a store: what each was, how it went, its scores, and the command that comes next."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from instructedit.console import console

if TYPE_CHECKING:
    from mlflow.entities import Run


def main(root: str = "mlruns", count: int = 15, children: bool = False) -> None:
    """Lists runs, the newest first; their ids can be given wherever an editor or a checkpoint is asked for.

    Args:
        root: Folder of the MLflow store.
        count: Number of runs to list.
        children: Also list the runs under an experiment's own: its rows, a run for each seed.
    """
    from rich.markup import escape
    from rich.table import Table

    from instructedit.run_names import next_command
    from instructedit.tracking import recent_runs

    every = recent_runs(root, children)
    table = Table("run", "status", "started", "scores", "next", show_lines=True)
    for run in every[:count]:
        info = run.info
        started = datetime.fromtimestamp(info.start_time / 1000).strftime("%Y-%m-%d %H:%M")
        then = next_command(info.run_id, info.status, run.data.tags)
        cells = (f"{info.run_name}\n{info.run_id}", info.status.lower(), started, scores(run), then)
        table.add_row(*map(escape, cells))
    console().print(table)
    if len(every) > count:
        print(f"{len(every) - count} older ones: --count {len(every)}")


def scores(run: Run) -> str:
    """Returns a run's main scores: an experiment's best row, each task's reliability, or the validation score."""
    tags, metrics = run.data.tags, run.data.metrics
    if "best.row" in tags:
        return f"best: {tags['best.row']} {tags['best.score']}"
    tasks = {n.split("/")[1]: v for n, v in metrics.items() if n.startswith("test/") and n.endswith("/reliability")}
    if tasks:
        return "reliability:\n" + "\n".join(f"{task} {value:.1f}" for task, value in tasks.items())
    return f"val/score {metrics['val/score']:.1f}" if "val/score" in metrics else ""
