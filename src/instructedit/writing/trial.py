"""Trial editor: measures its scores with a description, on validation records alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from instructedit.errors import UserError
from instructedit.metrics import paired_difference

if TYPE_CHECKING:
    from instructedit.editors import Editor
    from instructedit.lm import FrozenLM
    from instructedit.records import EditRecord

_FAILURES = 5  # failures that are shown for a description


@dataclass(frozen=True)
class Measured:
    """Scores of a description, with some of its failures.

    Attributes:
        values: Metric → record → value 0..1.
        failures: Some probes that went wrong, in words.
    """

    values: Mapping[str, Mapping[str, float]]
    failures: tuple[str, ...] = ()

    def mean(self, metric: str, clusters: Mapping[str, str]) -> float:
        """Computes a metric's mean over clusters of records, ×100."""
        groups: dict[str, list[float]] = {}
        for record, value in self.values[metric].items():
            groups.setdefault(clusters[record], []).append(value)
        return 100 * sum(sum(g) / len(g) for g in groups.values()) / len(groups)

    def scores(self) -> dict[str, float]:
        """Returns the score of each record: the mean of its metrics, 0..1."""
        every: dict[str, list[float]] = {}
        for values in self.values.values():
            for record, value in values.items():
                every.setdefault(record, []).append(value)
        return {record: sum(values) / len(values) for record, values in every.items()}


class Trial(Protocol):
    """Interface of whatever measures descriptions.

    Attributes:
        clusters: Record → cluster, of the validation records.
        identity: What the figures depend on besides the description: a resumed search must have the same.
    """

    clusters: dict[str, str]
    identity: dict[str, Any]

    def measure(self, text: str) -> Measured:
        """Measures the editor's scores with a description."""


class EditorTrial:
    """Trial of a trained editor on validation records of a task, under teacher forcing.

    Args:
        lm: The model.
        editor: The editor, bound to the model; it must read instructions.
        records: Records of the validation split.
        count: Number of records to use, chosen at random; all by default.
        seed: Seed of that choice.
        batch_size: Edits at once.

    Raises:
        UserError: If the editor reads no instructions, or a record is of another split.
    """

    def __init__(
        self, lm: FrozenLM, editor: Editor, records: list[EditRecord], count: int | None = None, seed: int = 0,
        batch_size: int = 64,
    ) -> None:  # fmt: skip
        if not editor.instructions:
            raise UserError(f"editor {editor.name!r} reads no instructions (instructions: false): nothing to improve")
        if strange := next((r.id for r in records if r.id.split("/")[1:2] != ["val"]), None):
            raise UserError(f"record {strange} is not of the validation split")
        if count is not None and count < len(records):
            records = [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), count))]
        self._lm, self._editor, self._records, self._batch_size = lm, editor, records, batch_size
        self.clusters = {record.id: record.cluster for record in records}
        self.identity: dict[str, Any] = {
            "lm": lm.fingerprint,
            "editor": _fingerprint(editor),
            "records": [r.id for r in records],
        }

    def measure(self, text: str) -> Measured:
        """Measures the editor's scores with a description: the task's main metrics except Fluency."""
        from instructedit.analysis.summary import metric_values
        from instructedit.evaluation import Evaluation, evaluate
        from instructedit.metrics import headline_metrics

        settings = Evaluation(generate=False, fluency_tokens=0, instruction=text)
        table = evaluate(self._lm, self._editor, self._records, settings, self._batch_size).table
        shown = headline_metrics()
        found = {
            metric: values.droplevel("cluster").to_dict()
            for _, metric, values in metric_values(table)
            if metric in shown
        }
        return Measured(found, tuple(self._failures(table)))

    def _failures(self, table: Any) -> list[str]:
        asked = table[table["main"] & table["kind"].isin(["reliability", "generalization", "portability"])]
        worst = asked[asked["accuracy"] < 1].sort_values("accuracy", kind="stable").head(_FAILURES)
        records = {record.id: record for record in self._records}
        lines = []
        for row in worst.itertuples():
            record = records[row.record]
            probe = (record.reliability, *record.probes)[row.probe]  # its prompt without the instruction
            lines.append(f"{row.kind}: {probe.prompt!r} should give {row.answer!r} ({100 * row.accuracy:.0f} % right)")
        return lines


def _fingerprint(editor: Editor) -> str:
    import hashlib

    digest = hashlib.sha256(f"{editor.name} {sorted(editor.options().items(), key=str)}".encode())
    for name, tensor in sorted(editor.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Verdict:
    """Comparison of a revision with the description that it would replace.

    Attributes:
        score: Mean difference of the score, ×100.
        better: Whether the score's interval lies above 0.
        differences: Metric → (mean, low, high), revision − description, ×100, 95 %: for the reader, not the decision.
    """

    score: float
    better: bool
    differences: Mapping[str, tuple[float, float, float]]

    def __str__(self) -> str:
        """Returns the differences in one line."""
        parts = [
            f"{name} {mean:+.1f} [{low:+.1f}, {high:+.1f}]" for name, (mean, low, high) in self.differences.items()
        ]
        return f"score {self.score:+.1f} ({', '.join(parts)})"


def compared(new: Measured, old: Measured, clusters: Mapping[str, str], comparisons: int = 1, seed: int = 0) -> Verdict:
    """Compares a revision with its description by their scores, record by record (paired bootstrap).

    A record's score is the mean of its metrics, as in ``val/score`` of training: a description that makes edits
    stronger gains in some metrics and loses in locality, and neither may decide alone.

    Args:
        new: The revision's figures.
        old: The description's figures.
        clusters: Record → cluster.
        comparisons: Number of revisions compared at once: one counts as better at the level 1 − 0.05 / comparisons
            (Bonferroni), since the best of many is better by chance.
        seed: Seed of the bootstrap.
    """
    level = 1 - 0.05 / max(1, comparisons)
    score = paired_difference(new.scores(), old.scores(), clusters, level, resamples=20_000, seed=seed)
    differences = {}
    for metric in [name for name in new.values if name in old.values]:
        gap = paired_difference(new.values[metric], old.values[metric], clusters, seed=seed)
        differences[metric] = (100 * gap.mean, 100 * gap.low, 100 * gap.high)
    return Verdict(100 * score.mean, score.low > 0, differences)
