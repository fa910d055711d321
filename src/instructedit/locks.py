"""Locks between processes: they let one process at a time do a job, and show which processes are alive.

A lock is a file that a live process holds (flock); the system releases it when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_ALIVE = "running"


@contextmanager
def one_at_a_time(place: Path, waiting: str = "") -> Iterator[None]:
    """Holds a lock within the context, after waiting for any other process that holds it.

    Args:
        place: A folder, which is locked itself; or the lock's own file, created if it does not exist.
        waiting: Message to print before waiting.
    """
    descriptor = os.open(place, os.O_RDONLY if place.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


class Alive:
    """Marker that tells other processes that its owner is alive, for as long as this process runs.

    Args:
        root: Folder of the store.
        name: Name of the owner; a name is never used again.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._place = root / _ALIVE / name
        self._file: TextIO | None = None
        part = self._place.with_name(f".{name}")
        with suppress(OSError):  # a file system without locks: nobody is ever taken for dead
            part.parent.mkdir(exist_ok=True)
            self._file = part.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.rename(self._place)  # so that the file never exists without its lock

    def end(self) -> None:
        """Removes the marker, which says that the owner ended in an orderly way."""
        with suppress(OSError):
            self._place.unlink(missing_ok=True)
            if self._file is not None:
                self._file.close()


def dead(root: Path) -> Iterator[str]:
    """Yields the names of `Alive` markers that were not ended although their process is gone.

    A name is yielded by later calls too, until a caller has handled it and asks for the next one.
    """
    for place in sorted((root / _ALIVE).glob("[!.]*")):
        try:
            with place.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield place.name
                place.unlink(missing_ok=True)
        except OSError:  # held, so it is alive; or handled by another process in the meantime
            continue
