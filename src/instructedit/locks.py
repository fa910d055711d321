"""Locks between processes: who makes or searches something, and who is alive.

A lock is a file that a living process holds (flock); the system lets go of it when the process ends, however it ends.
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
    """Holds a lock, and waits for it while another process does.

    Args:
        place: A folder, which is locked itself; or the lock's own file, made when it is not there.
        waiting: What to print before waiting.
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
    """Tells other processes that somebody is alive, for as long as this process is.

    Args:
        root: Folder of the store.
        name: Of whoever it is; no name comes again.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._place = root / _ALIVE / name
        self._file: TextIO | None = None
        part = self._place.with_name(f".{name}")
        with suppress(OSError):  # a file system without locks: nobody is ever taken for dead
            part.parent.mkdir(exist_ok=True)
            self._file = part.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.rename(self._place)  # never there without its lock

    def end(self) -> None:
        """Says that it is over."""
        with suppress(OSError):
            self._place.unlink(missing_ok=True)
            if self._file is not None:
                self._file.close()


def dead(root: Path) -> Iterator[str]:
    """Names of those that were `Alive`, did not end, and whose process is gone.

    A name comes again until whoever got it has done what is to be done, and asks for the next.
    """
    for place in sorted((root / _ALIVE).glob("[!.]*")):
        try:
            with place.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield place.name
                place.unlink(missing_ok=True)
        except OSError:  # held: it is alive; or found by another process in the meantime
            continue
