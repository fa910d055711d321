"""Where a process can be made to end: it is killed, or the disk is full, at the n-th time that it comes there."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import sqlalchemy
import torch

from instructedit import stores, tracking
from instructedit.callbacks import checkpoint
from instructedit.training.module import EditingModule

End = Callable[[], None]


def kill() -> None:
    """Ends this process as the system does when memory runs out: nothing is told, nothing tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """Fails as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def counted(number: int, end: End) -> End:
    """Calls `end` at its n-th call."""
    calls = iter(range(1, 1 << 30))
    return lambda: end() if next(calls) == number else None


def _before(owner: object, name: str) -> Callable[[End], None]:
    """At the entry of a function."""

    def put(end: End) -> None:
        inner = getattr(owner, name)

        def ending(*args: object, **options: object) -> object:
            end()
            return inner(*args, **options)

        setattr(owner, name, ending)

    return put


def _half_checkpoint(end: End) -> None:
    """In the middle of writing a checkpoint."""
    save = torch.save

    def ending(value: object, opened: io.BufferedWriter) -> None:
        buffer = io.BytesIO()
        save(value, buffer)
        content = buffer.getvalue()
        opened.write(content[: len(content) // 2])
        opened.flush()
        end()
        opened.write(content[len(content) // 2 :])

    torch.save = ending


def _half_states(end: End) -> None:
    """In the middle of writing states to the cache."""
    write = Path.write_bytes

    def ending(self: Path, content: bytes) -> int:
        if self.suffix == ".part":
            write(self, content[: len(content) // 2])
            end()
        return write(self, content)

    Path.write_bytes = ending


def _transaction(end: End) -> None:
    """Before a change of MLflow's database is sure."""
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", lambda connection: end())


def _half_store(end: End) -> None:
    """While MLflow's database is made."""
    make = stores.make_database

    def ending(file: Path) -> None:
        make(file)
        os.truncate(file, file.stat().st_size // 2)
        end()

    stores.make_database = ending


#: Name → what puts an end there, and how often a process of `harness` comes there at most.
PLACES: dict[str, tuple[Callable[[End], None], int]] = {
    "in a step": (_before(EditingModule, "training_step"), 6),
    "after a backward pass": (_before(EditingModule, "configure_gradient_clipping"), 6),
    "in a validation": (_before(EditingModule, "validation_step"), 6),
    "in the middle of a checkpoint": (_half_checkpoint, 12),
    "before a checkpoint is synced": (_before(checkpoint.os, "fsync"), 18),
    "before a checkpoint is renamed": (_before(Path, "replace"), 18),
    "after a checkpoint is renamed": (_before(checkpoint, "_sync"), 12),
    "before a write to MLflow": (_before(tracking.MLflowTracker, "log_metrics"), 12),
    "in a transaction of MLflow": (_transaction, 60),
    "in the middle of a write to the cache": (_half_states, 8),
    "while the store is made": (_half_store, 1),
}


def limit_files(size: int) -> None:
    """Lets no file of this process grow beyond a size: the disk is full for whatever is larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
