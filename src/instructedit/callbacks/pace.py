"""Says how far a fit is and how long it will take, where no progress bar shows it."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.utilities import rank_zero_info


class Pace(L.Callback):
    """Prints "step 120 of 300, about 3 min left" now and then, in logs and pipes; a terminal has Lightning's bar.

    Args:
        every: Seconds between two lines; 0: none.
    """

    def __init__(self, every: float = 60.0) -> None:
        self.every = every
        self._begun = self._said = 0.0
        self._first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begun = self._said = time.monotonic()
        self._first = trainer.global_step  # a resumed run began elsewhere

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        now, step, last = time.monotonic(), trainer.global_step, trainer.max_steps
        done = step - self._first
        if not self.every or now - self._said < self.every or done < 1 or last < 1 or sys.stdout.isatty():
            return
        self._said = now
        seconds = (now - self._begun) / done * (last - step)
        score = trainer.callback_metrics.get("val/score")
        so_far = "" if score is None else f", val/score {float(score):.1f}"
        rank_zero_info(f"step {step} of {last}, {time_left(seconds)}{so_far}")


def time_left(seconds: float) -> str:
    """A duration in words: ``about 3 min left``, ``about 2 h 10 min left``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute left"
    hours, minutes = divmod(minutes, 60)
    return "about " + " ".join(f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min")) if n) + " left"
