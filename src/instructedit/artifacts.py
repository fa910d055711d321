"""Where a run's tables, figures and files go: to each of its loggers, as far as it can take them."""

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

_SHOWN = 500  # rows of a table that a browser of artifacts shows


class Artifacts(ABC):
    """Keeps tables, figures and plain data of a run as files; a subclass says where a file goes.

    A logger that is one itself, such as `MLflowTracker`, is used as it is.
    """

    @abstractmethod
    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Keeps a copy of a file, or of a folder, in the run's folder ``folder``."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Says whether the run keeps a file or folder of this name, outside any folder."""

    @rank_zero_only
    def log_table(self, df: DataFrame, name: str) -> None:
        """Logs a table as ``tables/<name>.parquet``, and its first rows as CSV, which browsers of artifacts show.

        That file is ``<name>.csv``, or ``<name>.first-500.csv`` where there are more.
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
        """Shows which records a run read, where a logger has a place for it; all keep them as ``data.<stage>.json``.

        Args:
            datasets: ``task, split, source, kept, fingerprint`` of each.
        """

    @rank_zero_only
    def log_editor(self, folder: Path, name: str, example: dict[str, str]) -> None:
        """Keeps a saved editor's folder.

        Args:
            folder: Where it was saved.
            name: What to call it where editors have names.
            example: A request, for where an example is shown: ``prompt``, ``target``, ``task``.
        """
        self.log_file(folder)


class FolderArtifacts(Artifacts):
    """Keeps everything as files in a folder, beside what a logger writes there itself.

    Args:
        folder: Of the run; made when it is not there.
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
    """Shows figures in TensorBoard, and keeps the rest as files in the logger's folder.

    Args:
        folder: Of the run.
        logger: TensorBoard's.
        step: The optimiser step that figures stand at.
    """

    def __init__(self, folder: str | Path, logger: TensorBoardLogger, step: int) -> None:
        super().__init__(folder)
        self.logger, self.step = logger, step

    @rank_zero_only
    def log_figure(self, figure: Figure, name: str) -> None:
        self.logger.experiment.add_figure(name, figure, self.step, close=False)


def artifacts(trainer: Trainer) -> list[Artifacts]:
    """Lists what takes the tables, figures and files of a run: one for each of its loggers that can.

    A logger that keeps artifacts itself does so; any other with a folder of its own has them as files there. A logger
    without one is named once. `fast_dev_run` keeps nothing.
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
    """A logger's folder of this run: its own, or where Lightning puts the checkpoints."""
    if own := getattr(logger, "log_dir", None):
        return Path(own)
    if not logger.save_dir:
        return None
    version = f"version_{logger.version}" if isinstance(logger.version, int) else str(logger.version or "")
    return Path(logger.save_dir, str(logger.name or ""), version)


@cache
def _say_none_are_kept(name: str) -> None:
    rank_zero_info(f"{name} has no folder: tables, figures and files are not kept (MLflowTracker, CSVLogger keep them)")
