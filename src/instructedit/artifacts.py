"""Storage of a run's tables, figures and files with each of its loggers, as far as the logger supports it."""

from __future__ import annotations

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from instructedit.drawing import save_figure

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from matplotlib.figure import Figure
    from pandas import DataFrame

_SHOWN = 500  # rows in the CSV copy of a table, which artifact browsers show


class Artifacts(ABC):
    """Base class that stores a run's tables, figures and plain data as files; a subclass decides where they go.

    A logger that is an `Artifacts` itself, such as `MLflowTracker`, is used directly.
    """

    @abstractmethod
    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Stores a copy of a file or folder in the run's folder ``folder``."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """True if the run has a file or folder of this name at its top level."""

    @rank_zero_only
    def log_table(self, df: DataFrame, name: str) -> None:
        """Logs a table as ``tables/<name>.parquet``, and its first rows as CSV, which artifact browsers can show.

        The CSV file is ``<name>.csv``, or ``<name>.first-500.csv`` if the table has more rows.
        """
        path = Path("tables", name)
        shown = f"{path.name}.csv" if len(df) <= _SHOWN else f"{path.name}.first-{_SHOWN}.csv"
        with tempfile.TemporaryDirectory() as folder:
            df.to_parquet(Path(folder, f"{path.name}.parquet"))
            df.head(_SHOWN).to_csv(Path(folder, shown), index=False)
            for file in (f"{path.name}.parquet", shown):
                self.log_file(Path(folder, file), path.parent.as_posix())

    @rank_zero_only
    def log_figure(self, figure: Figure, name: str) -> None:
        """Logs a figure as ``figures/<name>.png`` and ``.svg``."""
        with tempfile.TemporaryDirectory() as folder:
            for file in save_figure(figure, Path(folder, name)):
                self.log_file(file, "figures")

    @rank_zero_only
    def log_text(self, text: str, name: str) -> None:
        """Logs a text as the file ``name``."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, name).write_text(text)
            self.log_file(Path(folder, name))

    @rank_zero_only
    def log_json(self, obj: dict[str, Any] | list[Any], name: str) -> None:
        """Logs plain data as ``<name>.json``."""
        self.log_text(json.dumps(obj, indent=2, default=str), f"{name}.json")

    @rank_zero_only
    def log_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        """Logs which data the run used: ``{"counterfact/train": "<sha256>"}``."""
        self.log_json(dict(fingerprints), "fingerprints")

    @rank_zero_only  # noqa: B027  # most loggers have no such place
    def log_datasets(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Shows which records a run read, if the logger supports it; every logger also keeps ``data.<stage>.json``.

        Args:
            datasets: The ``task, split, source, kept, fingerprint`` of each dataset.
        """

    @rank_zero_only
    def log_editor(self, folder: Path, name: str, example: dict[str, str]) -> None:
        """Stores a copy of a saved editor's folder.

        Args:
            folder: Folder in which the editor was saved.
            name: Name of the editor, for loggers that name editors.
            example: A request (``prompt``, ``target``, ``task``), for loggers that show an example.
        """
        self.log_file(folder)


class FolderArtifacts(Artifacts):
    """Stores everything as files in a folder, next to what a logger writes there itself.

    Args:
        folder: Folder of the run; created if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @rank_zero_only
    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        into = self.folder / (folder or "")
        into.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            shutil.copytree(path, into / Path(path).name, dirs_exist_ok=True)
        else:
            shutil.copy(path, into)

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()


class TensorBoardArtifacts(FolderArtifacts):
    """Shows figures in TensorBoard, and stores the rest as files in the logger's folder.

    Args:
        folder: Folder of the run.
        logger: The TensorBoard logger.
        step: The optimiser step at which figures are logged.
    """

    def __init__(self, folder: str | Path, logger: TensorBoardLogger, step: int) -> None:
        super().__init__(folder)
        self.logger, self.step = logger, step

    @rank_zero_only
    def log_figure(self, figure: Figure, name: str) -> None:
        self.logger.experiment.add_figure(name, figure, self.step, close=False)


def artifacts(trainer: Trainer) -> list[Artifacts]:
    """Lists the stores of a run's tables, figures and files: one for each logger that can keep them.

    A logger that stores artifacts itself is used directly; for any other logger with a folder, they become files in
    that folder. A logger without a folder is reported once. `fast_dev_run` stores nothing.
    """
    found = [_artifacts_of(logger, trainer.global_step) for logger in trainer.loggers]
    return [each for each in found if each is not None]


def _artifacts_of(logger: Logger, step: int) -> Artifacts | None:
    if isinstance(logger, Artifacts):
        return logger
    if isinstance(logger, DummyLogger):
        return None
    folder = _run_folder(logger)
    if folder is None:
        _say_none_are_kept(type(logger).__name__)
        return None
    if isinstance(logger, TensorBoardLogger):
        return TensorBoardArtifacts(folder, logger, step)
    return FolderArtifacts(folder)


def _run_folder(logger: Logger) -> Path | None:
    """Returns a logger's folder for this run: its own, or the one in which Lightning puts the checkpoints."""
    if own := getattr(logger, "log_dir", None):
        return Path(own)
    if not logger.save_dir:
        return None
    version = f"version_{logger.version}" if isinstance(logger.version, int) else str(logger.version or "")
    return Path(logger.save_dir, str(logger.name or ""), version)


@cache
def _say_none_are_kept(name: str) -> None:
    rank_zero_info(f"{name} has no folder: tables, figures and files are not kept (MLflowTracker, CSVLogger keep them)")
