"""Statistics of an experiment's datasets (Table 5), with the paper's numbers of records for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section

if TYPE_CHECKING:
    from pandas import DataFrame

    from instructedit.data.module import EditData

_SPLITS = {"fit": "train", "validate": "val", "test": "test"}


class StatisticsSection(Section):
    """Section that counts the data of each task and split in the first row's config, and what was left out.

    It counts records, edits, probes and tokens. The published numbers are those of the metrics ``records.train``,
    ``records.val`` and ``records.test``.
    """

    name: ClassVar[str] = "statistics"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields the statistics and what the readers dropped, or nothing without rows."""
        import pandas as pd
        import yaml

        from instructedit.analysis.statistics import dataset_statistics
        from instructedit.lm import Loading
        from instructedit.lm.loading import load_tokenizer

        runs = next(iter(results.rows.values()), None)
        if not runs:
            return
        config = yaml.safe_load(runs[0].artifact("config.yaml").read_text())
        lm = config["model"]["lm"]
        asked = Loading(revision=lm.get("revision"), gguf_file=lm.get("gguf_file"))
        data, tokenizer = loaded(config["data"]), load_tokenizer(lm["name"], asked)
        records = {
            (task, split): own for part, split in _SPLITS.items() for task, own in data.records.get(part, {}).items()
        }
        table = dataset_statistics(records, lambda text: len(tokenizer(text)["input_ids"]))
        table["tokens"] = table["tokens"].round(1)
        if results.published is not None:
            keys = zip(table["task"], table["split"], strict=True)
            table.insert(3, "paper", pd.array([_published(results.published, *key) for key in keys], dtype="Int64"))
        table = results.titled(table).sort_values("task", key=lambda names: names.map(_order(names)), kind="stable")
        note = (
            "records: of the dataset (ConvSent: topics). edits: what they give; validation takes no more than "
            f"{config['data']['val_size']} of a task. Then the probes of each kind, each once for a record. tokens "
            "and longest: of a request with its target."
        )
        yield Panel("statistics", "What the datasets hold", note, frame=table.reset_index(drop=True))
        if left := _left_out(data):
            frame = results.titled(pd.DataFrame(left, columns=["task", "split", "what", "reason", "count"]))
            yield Panel("left-out", "What the readers dropped, and what they noted", frame=frame)


def loaded(options: dict[str, Any]) -> EditData:
    """Loads the data module of a run's config with all its records, except splits for which it names no task."""
    from jsonargparse import ArgumentParser

    from instructedit.data.module import EditData

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EditData, "data")
    data: EditData = parser.instantiate(parser.parse_object({"data": options})).data
    for part, sources in data.sources.items():
        if sources:
            data.setup(part)
    return data


def _published(figures: DataFrame, task: str, split: str) -> int | None:
    own = figures[(figures["task"] == task) & (figures["metric"] == f"records.{split}")]
    return int(own["mean"].iloc[0]) if len(own) else None


def _order(names: Any) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _left_out(data: EditData) -> list[tuple[str, str, str, str, int]]:
    return [
        (report.task, report.split, what, reason, count)
        for report in data.reports
        for what, counts in (("dropped", report.dropped), ("noted", report.noted))
        for reason, count in counts.most_common()
    ]
