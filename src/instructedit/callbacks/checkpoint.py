"""Checkpoints of a fit: the best validated state and the last one, written as complete files or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from instructedit.errors import UserError

#: Suffix of a checkpoint that is being written, beside the one that it replaces.
PART = ".part"


class WholeFiles(TorchCheckpointIO):
    """Atomic checkpoint writer: writes beside the target, syncs and renames, so that the old file survives a failure.

    Lightning writes to the temporary folder instead, from where the file is copied piece by piece if the target is on
    another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint atomically.

        Raises:
            UserError: If it cannot be written, for example because the disk is full.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        part = file.with_name(f".{file.name}{PART}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as opened:
                torch.save(checkpoint, opened)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
            _sync(file.parent)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
            part.unlink(missing_ok=True)
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{file}: the checkpoint cannot be written ({why}); the one before it stays") from error


def _sync(folder: Path) -> None:
    """Syncs a folder, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot
        pass
    finally:
        os.close(descriptor)


def _validates_next(trainer: Any) -> bool:
    """True if a validation follows the training batch that has just ended; `on_validation_end` is called after it."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


class Checkpoint(ModelCheckpoint):
    """Keeps the editor with the best validation score, and the last one; neither file contains the LM.

    Args:
        monitor: Metric whose best checkpoint is kept; without validation only the last one is kept.
        save_last: Also keep the last state, to resume from.
        every_n_train_steps: Save the last state also every so many steps, in addition to every validation.
    """

    def __init__(
        self, monitor: str | None = "val/score", save_last: bool = True, every_n_train_steps: int | None = None
    ) -> None:
        # The monitored metric changes only at a validation, so that a best checkpoint is not sought in between.
        super().__init__(
            monitor=monitor, mode="max", save_last=False, filename="step-{step}", auto_insert_metric_name=False,
            enable_version_counter=False, every_n_train_steps=None if monitor else every_n_train_steps,
        )  # fmt: skip
        self.keeps_last, self.every, self._kept = save_last, every_n_train_steps, 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # unless the user set a plugin
            trainer.strategy.checkpoint_io = WholeFiles()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best score so far, also in the folder of another run, where Lightning would start over."""
        best = state_dict.get("best_model_path")
        if best and Path(best).is_file():
            state_dict = state_dict | {"dirpath": self.dirpath}
            super().load_state_dict(state_dict)

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        due = self.every and trainer.global_step % self.every == 0 and trainer.global_step != self._kept
        # A run that resumes from a state saved before its validation would never validate that step.
        if due and not _validates_next(trainer):
            self._keep_last(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        self._keep_last(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._keep_last(trainer)

    def _keep_last(self, trainer: Any) -> None:
        """Saves the last state, which Lightning's own `save_last` does only together with a new best one."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run
        if self.keeps_last and fitting:
            self._kept = trainer.global_step
            # Set before saving, since the path is part of the state.
            self.last_model_path = self.format_checkpoint_name(trainer.callback_metrics, self.CHECKPOINT_NAME_LAST)
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)
