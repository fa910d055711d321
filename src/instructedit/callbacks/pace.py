"""Reports the progress and remaining time of a fit or a test where no progress bar is shown."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.utilities import rank_zero_info


class Pace(L.Callback):
    """Prints "step 120 of 300, about 3 min left" at intervals, unless a terminal shows Lightning's progress bar.

    For a test the line is "tested 96 of 340 records, about 3 min left".

    Args:
        every: Seconds between two lines; 0 prints none.
    """

    def __init__(self, every: float = 60.0) -> None:
        self.every = every
        self._begun = self._said = 0.0
        self._first = self._tested = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begun = self._said = time.monotonic()
        self._first = trainer.global_step  # a resumed run does not start at step 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        step, last, score = trainer.global_step, trainer.max_steps, trainer.callback_metrics.get("val/score")
        so_far = "" if score is None else f", val/score {float(score):.1f}"
        self._say(f"step {step} of {last}", step - self._first, last - step, so_far)

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begun = self._said = time.monotonic()
        self._tested = 0

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._tested += len(batch)
        loaders: Any = trainer.test_dataloaders
        every = sum(len(loader.dataset) for loader in (loaders if isinstance(loaders, list) else [loaders]))
        self._say(f"tested {self._tested} of {every} records", self._tested, every - self._tested)

    def _say(self, how_far: str, done: int, left: int, so_far: str = "") -> None:
        now = time.monotonic()
        if not self.every or now - self._said < self.every or done < 1 or left < 0 or sys.stdout.isatty():
            return
        self._said = now
        rank_zero_info(f"{how_far}, {time_left((now - self._begun) / done * left)}{so_far}")


def time_left(seconds: float) -> str:
    """Formats a duration in words: ``about 3 min left``, ``about 2 h 10 min left``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute left"
    hours, minutes = divmod(minutes, 60)
    return "about " + " ".join(f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min")) if n) + " left"
