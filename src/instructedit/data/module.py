"""The LightningDataModule, with the tasks to train, validate and test on, and their mixture."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L  # noqa: N812
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from instructedit.data.batch import Collator, EditBatch
from instructedit.data.mixture import MixtureSampler
from instructedit.data.neighborhood import with_neighbors
from instructedit.errors import UserError, at_least
from instructedit.instructions import Instructor
from instructedit.lm import Text
from instructedit.processes import place_among
from instructedit.records import EditRecord
from instructedit.renamed import renamed_names
from instructedit.tasks import LoadReport, load_records, task_name, task_title


@dataclass(frozen=True)
class TaskSource:
    """A task in a run, with the source of its records.

    Attributes:
        name: Name of the task, or the path of a folder with a ``task.yaml``.
        source: ``tiny`` (embedded), a file, a folder with a file for each split, or a hub id ``owner/name``; by default
            the task's place (see `EditData`), and without one its own folder or ``tiny``.
        split: The split to read; by default that of the stage. ``train[:-50]`` and ``train[-50:]`` or ``train[:90%]``
            are parts of one, for data without validation records of their own.
        size: Number of records to choose at random; all by default.
        weight: Share in the training mixture, relative to the other tasks' (``mixing: balanced``).
        options: Further options of the task's reader.
    """

    name: str
    source: str | None = None
    split: str | None = None
    size: int | None = None
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(1, **{f"size of task {self.name!r}": self.size})
        at_least(1e-9, **{f"weight of task {self.name!r}": self.weight})


@dataclass(frozen=True)
class DataLocation:
    """The location of a task's records, with the splits for each stage of a run.

    Attributes:
        source: See `TaskSource`.
        train: The split, or part of one, to train on.
        val: The one to validate on.
        test: The one to test on.
    """

    source: str | None = None
    train: str = "train"
    val: str = "val"
    test: str = "test"


__getattr__ = renamed_names(__name__, Place=DataLocation)


class EditData(L.LightningDataModule):
    """A data module with balanced streams of edit records for training, and whole splits for validation and test.

    Args:
        train: Tasks to train on. One task gives a single-task editor; leaving one out gives a hold-out setting.
        val: Tasks to validate on; those of `train` if empty.
        test: Tasks to test on, including held-out ones; those of `train` if empty.
        places: Location of each task's records, for all tasks above that name no source of their own.
        batch_size: Edit requests per training step (before accumulation).
        eval_batch_size: Edit requests per evaluation step.
        mixing: ``balanced``: tasks in proportion to their weights, so that a large one such as ConvSent is
            subsampled; ``natural``: in proportion to their sizes.
        rephrases: Most in-scope probes that a record adds to its request in the edit loss.
        portability: Most probes of the edit's implications that a record adds; by default training uses none.
        replies: Most replies of each sentiment that a ConvSent record adds.
        locality: Most out-of-scope probes of a record in the locality loss.
        max_length: Most tokens in a training row; the LM's own limit by default (paper: 96).
        val_size: Records of each task to validate on.
        seed: Seed of the mixture and of the instructions and probes that are drawn.
        num_workers: Number of processes that tokenise in advance; 0 tokenises between the steps.
        neighbors: Most neighborhood probes of each test record, which ask the same about other subjects of its split.
    """

    def __init__(
        self,
        train: list[TaskSource] | None = None,
        val: list[TaskSource] | None = None,
        test: list[TaskSource] | None = None,
        places: dict[str, DataLocation] | None = None,
        batch_size: int = 24,
        eval_batch_size: int = 32,
        mixing: Literal["balanced", "natural"] = "balanced",
        rephrases: int = 1,
        replies: int = 2,
        locality: int = 2,
        max_length: int | None = None,
        val_size: int | None = 50,
        seed: int = 0,
        num_workers: int = 0,
        portability: int = 0,
        neighbors: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, max_length=max_length)
        at_least(
            0, num_workers=num_workers, rephrases=rephrases, replies=replies, locality=locality, val_size=val_size,
            portability=portability, neighbors=neighbors,
        )  # fmt: skip
        self.save_hyperparameters()
        self.sources = {"fit": train or [], "validate": val or train or [], "test": test or train or []}
        self.places = places or {}
        self.records: dict[str, dict[str, list[EditRecord]]] = {}
        self.reports: list[LoadReport] = []
        self.batches_used = 0
        self._encoding: tuple[Text, Callable[..., Instructor | None]] | None = None

    def connect(self, text: Text, instructor: Callable[..., Instructor | None]) -> None:
        """Sets the tokenization of training records; called by `EditingModule.connect` with its editor's.

        Args:
            text: Tokenization of prompts and answers.
            instructor: Makes an instructor from a ``seed``; it returns None if prompts have no instructions.
        """
        self._encoding = text, instructor

    def setup(self, stage: str) -> None:
        """Reads the records that the stage needs, and reports what was dropped.

        Raises:
            UserError: If there is no such task, also among `places`, or its records cannot be read.
        """
        for name in self.places:  # a task whose place has a misspelt name would be read from the embedded data
            task_title(name)
        wanted = {"fit": ("fit", "validate"), "predict": ("test",)}.get(stage, (stage,))
        for part in wanted:
            if part not in self.records:
                self.records[part] = self._read(part)
        self._warn_of_shared(wanted[-1])

    def _read(self, part: str) -> dict[str, list[EditRecord]]:
        if not self.sources[part]:
            raise UserError(f"data: no task to {part}: give data.{'train' if part == 'fit' else part}")
        found: dict[str, list[EditRecord]] = {}
        for source in self.sources[part]:
            if (name := task_name(source.name)) in found:
                raise UserError(f"data: task {name!r} is listed twice for {part}")
            found[name], report = self._load(source, part)
            self.reports.append(report)
            rank_zero_info(report.line())
        return found

    def _load(self, source: TaskSource, part: str) -> tuple[list[EditRecord], LoadReport]:
        place = self._place(source)
        split = source.split or getattr(place, {"fit": "train", "validate": "val", "test": "test"}[part])
        records, report = load_records(source.name, place.source, split, **dict(source.options))
        chosen = self._subsample(records, source.size or (self.hparams["val_size"] if part == "validate" else None))
        if part == "test" and (count := self.hparams["neighbors"]):
            chosen = with_neighbors(chosen, count, records)
            alone = sum(not record.of("neighborhood") for record in chosen)
            report.note(
                "tested without a neighborhood probe, since no record asks the same about another subject", alone
            )
        return chosen, report

    def _place(self, source: TaskSource) -> DataLocation:
        return self.places.get(source.name, DataLocation()) if source.source is None else DataLocation(source.source)

    def _warn_of_shared(self, part: str) -> None:
        """Warns if records of a stage are also trained on, with their number."""
        for source in self.sources[part]:
            name = task_name(source.name)
            trained = {_edit(record) for record in self._trained(name)}
            if shared := sum(_edit(record) in trained for record in self.records[part][name]):
                rank_zero_warn(
                    f"data: {shared} of {len(self.records[part][name])} records of {name!r} to {part} are trained on, "
                    "too (same prompt and target): give parts that do not overlap, such as train[:80%] and train[80%:]"
                )

    def _trained(self, name: str) -> list[EditRecord]:
        """Returns a task's training records; a test reads them only for its warning, if they are available locally."""
        if "fit" in self.records:
            return self.records["fit"].get(name, [])
        for source in self.sources["fit"]:
            if task_name(source.name) == name and Path(self._place(source).source or source.name).exists():
                with suppress(UserError):  # a test does not fail because training records cannot be read
                    return self._load(source, "fit")[0]
        return []

    def _subsample(self, records: list[EditRecord], size: int | None) -> list[EditRecord]:
        if size is None or size >= len(records):
            return records
        chosen = random.Random(self.hparams["seed"]).sample(range(len(records)), size)
        return [records[i] for i in sorted(chosen)]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the data that was read, ``task/split`` → SHA-256 of the bytes."""
        return {f"{r.task}/{r.split}": r.fingerprint for r in self.reports}

    @property
    def titles(self) -> dict[str, str]:
        """Titles of the test tasks in tables, with a remark for those that are held out of training."""
        trained = {task_name(source.name) for source in self.sources["fit"]}
        titles = {task_name(source.name): task_title(source.name) for source in self.sources["test"]}
        return {
            name: title + (" (held out)" if trained and name not in trained else "") for name, title in titles.items()
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns an endless stream of `EditBatch`."""
        options, tasks = self.hparams, self.records["fit"]
        sampler = self._sampler(options["batch_size"], self.batches_used, *self._process())
        return DataLoader(
            _Drawn(list(tasks.values())), batch_sampler=sampler, collate_fn=self._collator(),
            num_workers=options["num_workers"], persistent_workers=options["num_workers"] > 0,
        )  # fmt: skip

    def first_records(self, count: int) -> EditBatch:
        """Returns the first records of the training stream as one batch, the same in every process."""
        drawn = _Drawn(list(self.records["fit"].values()))
        return self._collator()([drawn[key] for key in next(iter(self._sampler(count)))])

    def _sampler(self, batch_size: int, first: int = 0, rank: int = 0, world: int = 1) -> MixtureSampler:
        sizes = [len(records) for records in self.records["fit"].values()]
        balanced = self.hparams["mixing"] == "balanced"
        weights = [s.weight for s in self.sources["fit"]] if balanced else [float(size) for size in sizes]
        return MixtureSampler(sizes, weights, self.hparams["seed"], batch_size, first, rank, world)

    def _collator(self) -> Collator:
        options = self.hparams
        if self._encoding is None:
            raise UserError("data: the training stream needs the editing module: call module.connect(data)")
        text, instructor = self._encoding
        return Collator(
            text.within(options["max_length"]), instructor(seed=options["seed"]),
            options["rephrases"], options["replies"], options["locality"], options["seed"], options["portability"],
        )  # fmt: skip

    def _whole(self, part: str) -> DataLoader[Any]:
        """Returns this process's share of all tasks' records; no record is repeated to make the shares equal.

        A process without a share gets one empty batch, since without any it would not synchronise with the others.
        """
        records = [record for task in self.records[part].values() for record in task]
        rank, world = self._process()
        share = _Records(records[rank::world])
        if not len(share):
            return DataLoader(share, batch_sampler=[[]], collate_fn=list)
        return DataLoader(share, batch_size=self.hparams["eval_batch_size"], collate_fn=list)

    def _process(self) -> tuple[int, int]:
        """Returns this process's rank and the number of processes, where those that share a sharded LM count as one."""
        return place_among(self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns batches of validation records."""
        return self._whole("validate")

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns batches of test records."""
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns batches of test records."""
        return self._whole("test")

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Moves the tokens of a training batch to the device; records, which are text, stay where they are."""
        return batch.to(device) if isinstance(batch, EditBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the run's position in the training stream."""
        trainer = self.trainer
        return {"batches_used": trainer.fit_loop.epoch_loop.batch_progress.total.ready if trainer else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the run's position in the training stream."""
        self.batches_used = state_dict["batches_used"]


def _edit(record: EditRecord) -> tuple[str, str]:
    """Returns the key by which two splits must not overlap: prompt and target, regardless of case."""
    return record.request.prompt.casefold(), record.request.target.casefold()


class _Drawn(Dataset[tuple[int, EditRecord]]):
    """A dataset that maps (draw, task, index) to (draw, record)."""

    def __init__(self, tasks: list[list[EditRecord]]) -> None:
        self.tasks = tasks

    def __getitem__(self, key: Any) -> tuple[int, EditRecord]:
        draw, task, index = key
        return draw, self.tasks[task][index]


class _Records(Dataset[EditRecord]):
    def __init__(self, records: list[EditRecord]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EditRecord:
        return self.records[index]
