"""Audit of a run: checks that its results still follow from its logged probe rows, its editor's file and its data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructedit.configs import parsed, read_yaml
from instructedit.errors import UserError
from instructedit.records import EditRecord
from instructedit.tracking import artifact_path, find_run, load_table

if TYPE_CHECKING:
    from mlflow.entities import Run
    from pandas import DataFrame

#: Relative and absolute tolerance; the Trainer computes its own means in float32.
_TOLERANCE = 1e-5
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Finding:
    """Result of one check of an audit.

    Attributes:
        what: Name of the thing that was checked.
        result: What was found, as a phrase.
        agrees: Whether it agrees with what the run logged.
    """

    what: str
    result: str
    agrees: bool = True

    def __str__(self) -> str:
        return f"{'ok     ' if self.agrees else 'DIFFERS'} {self.what}: {self.result}"


def audit(run: str, root: str | Path = "mlruns") -> list[Finding]:
    """Recomputes what a run logged, and checks that its files have not changed.

    Args:
        run: Id of the run, or its name.
        root: Folder of the store.

    Returns:
        A finding for each check: the summary and the logged means, recomputed from the probe rows; the editor's file;
        each dataset's fingerprint; and what training and test records share (which does not count as a difference).

    Raises:
        UserError: If there is no such run, or it logged no probe rows.
    """
    found = find_run(run, root)
    parts: tuple[Callable[[Run, Path], Iterator[Finding]], ...] = (_tables, _editor, _data, _shared)
    return [finding for part in parts for finding in part(found, Path(root).expanduser())]


def _tables(run: Run, root: Path) -> Iterator[Finding]:
    from instructedit.analysis.summary import summarise

    rows, logged = (load_table(run.info.run_id, name, root) for name in ("probes", "summary"))
    yield _scores(rows)
    again = summarise(rows, str(logged["method"].iloc[0]))
    keys = ["task", "metric"]
    both = logged.merge(again, how="outer", on=keys, suffixes=(" logged", " recomputed"), indicator=True)
    apart = []
    for row in both.to_dict("records"):
        pairs = [(row[f"{part} logged"], row[f"{part} recomputed"]) for part in ("mean", "low", "high", "n")]
        if row["_merge"] != "both" or not all(_same(*pair) for pair in pairs):
            apart.append(f"{row['task']} {row['metric']} {pairs[0][0]:.2f}, recomputed {pairs[0][1]:.2f}")
    yield _finding("summary", apart, f"{len(both)} means and intervals from {len(rows)} probe rows")
    means = {f"test/{row.task}/{row.metric}": row.mean for row in again.itertuples()}
    metrics = {name: value for name, value in run.data.metrics.items() if name in means}
    apart = [f"{n} {v:.4f}, recomputed {means[n]:.4f}" for n, v in metrics.items() if not _same(v, means[n])]
    yield _finding("logged means", apart, f"{len(metrics)} metrics")


def _scores(rows: DataFrame) -> Finding:
    """Checks that accuracies lie between 0 and 1, that scores are finite, and that no probe occurs twice."""
    from instructedit.metrics import editing_metrics

    apart = []
    for column in sorted({m.column for m in editing_metrics().values() if m.column} & set(rows)):
        known = rows[column].dropna()
        if column == "accuracy" and not known.between(0, 1).all():
            apart.append(f"{column} outside 0 to 1")
        if not known.map(math.isfinite).all():
            apart.append(f"{column} is infinite")
    names = ["task", "record", "kind", "group", "view", "probe"]
    if twice := int(rows.duplicated([name for name in names if name in rows]).sum()):
        apart.append(f"{twice} probes stand twice")
    return _finding("probe rows", apart, f"{len(rows)} of {len(rows[['task', 'record']].drop_duplicates())} records")


def _editor(run: Run, root: Path) -> Iterator[Finding]:
    from instructedit.edits.checksums import file_checksum

    try:
        logged = json.loads(artifact_path(run.info.run_id, "tested_editor.json", root).read_text())
    except UserError:
        yield Finding("editor", "the run logged no checksum (it is of an older version)")
        return
    if logged["file"] is None:
        yield Finding("editor", f"{logged['method']} was tested without a file")
        return
    file = _moved(Path(logged["file"]), root)
    apart = []
    if not file.is_file():
        apart.append(f"{file} is gone")
    elif file_checksum(file) != logged["sha256"]:
        apart.append(f"{file} is another file than the one that was tested (sha256)")
    yield _finding("editor", apart, f"{file}, sha256 {logged['sha256'][:12]}")


def _moved(file: Path, root: Path) -> Path:
    """Returns a checkpoint's path in a store that was moved or copied: its last four components stay the same."""
    there = root.joinpath(*file.parts[-4:])
    return there if there.is_file() else file


def _data(run: Run, root: Path) -> Iterator[Finding]:
    from instructedit.tasks.sources import read_source

    for stage in ("fit", "test"):
        try:
            reports = json.loads(artifact_path(run.info.run_id, f"data.{stage}.json", root).read_text())
        except UserError:
            continue
        for report in reports:
            what = f"data of {stage}, {report['task']} {report['split']}"
            try:
                found = read_source(report["task"], report["source"], report["split"]).fingerprint
                same = found == report["fingerprint"]
                apart = [] if same else [f"{report['source']} holds other bytes: sha256 {found[:12]}"]
            except UserError as error:
                apart = [str(error)]
            yield _finding(what, apart, f"{report['source']}, sha256 {report['fingerprint'][:12]}")


def _shared(run: Run, root: Path) -> Iterator[Finding]:
    from instructedit.data.module import EditData

    config = read_yaml(artifact_path(run.info.run_id, _CONFIG, root))["data"]
    if not config.get("train"):
        yield Finding("training and test", "the run's configuration names no training data")
        return
    data = parsed(EditData, config, f"run {run.info.run_id}, {_CONFIG}")
    try:
        for stage in ("fit", "test"):
            data.setup(stage)
    except UserError as error:
        yield Finding("training and test", f"cannot be compared: {error}", agrees=False)
        return
    for (task, records), (other, trained) in (
        (test, train) for test in data.records["test"].items() for train in data.records["fit"].items()
    ):
        subjects, prompts = shared(trained, records)
        if subjects or prompts:
            counts = f"{subjects} of {len(records)} share a subject, {prompts} a prompt"
            yield Finding(f"test records of {task}", f"{counts} with the training records of {other}")


def shared(train: Iterable[EditRecord], test: Iterable[EditRecord]) -> tuple[int, int]:
    """Counts the test records that share their subject, and those that share a prompt, with a training record.

    Case and white space are ignored. A record's prompts are those of its request and its rephrasings.
    """
    train = list(train)
    subjects = {_plain(r.request.subject) for r in train if r.request.subject}
    prompts = {prompt for record in train for prompt in _prompts(record)}
    found = [(_plain(r.request.subject or "") in subjects, not prompts.isdisjoint(_prompts(r))) for r in test]
    return sum(subject for subject, _ in found), sum(prompt for _, prompt in found)


def _prompts(record: EditRecord) -> set[str]:
    return {_plain(probe.prompt) for probe in record.of("reliability", "generalization")}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _same(a: Any, b: Any) -> bool:
    """True if two numbers are equal up to rounding, or both are missing (NaN)."""
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _finding(what: str, apart: list[str], fine: str) -> Finding:
    return Finding(what, "; ".join(apart) or fine, agrees=not apart)
