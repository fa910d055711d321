"""Creation of local MLflow stores: completely or not at all, even if other processes create the same one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from instructedit.locks import one_at_a_time

DATABASE = "mlflow.db"
#: Seconds to wait for another process that writes to the database, or a slow disk: SQLite's default of 5 ends a run.
_PATIENCE = 60
_MAKING = ".making-"  # prefix of a folder in which a store is made


def local_store(root: Path) -> str:
    """Returns the store's URI, creating the store if needed; cleans up after a process killed while creating it."""
    database = root / DATABASE
    if not database.exists() or any(root.glob(f"{_MAKING}*")):
        root.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root):
            for left in root.glob(f"{_MAKING}*"):
                shutil.rmtree(left, ignore_errors=True)
            _make_store(root)
    return database_uri(database)


def database_uri(file: Path) -> str:
    """Returns the URI of an SQLite database, with the time for which its users wait for one another."""
    return f"sqlite:///{file}?timeout={_PATIENCE}"


def _make_store(root: Path) -> None:
    database = root / DATABASE
    if not database.exists():
        # MLflow takes seconds to migrate a new database, without a lock: a second process, or a kill in between, would
        # leave it broken for good. So it is made elsewhere, and the first process to finish puts it in place.
        with tempfile.TemporaryDirectory(dir=root, prefix=_MAKING, ignore_cleanup_errors=True) as folder:
            made = Path(folder, DATABASE)
            make_database(made)
            try:
                os.link(made, database)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                made.rename(database)


def make_database(file: Path) -> None:
    """Creates an empty database with MLflow's tables, without MLflow's log lines about each of them."""
    from mlflow import MlflowClient

    noisy = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.WARNING)
        MlflowClient(f"sqlite:///{file}")
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
