"""Makes local MLflow stores: whole or not at all, whoever else makes the same one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from instructedit.locks import one_at_a_time

DATABASE = "mlflow.db"
#: Seconds to wait while somebody else writes to the database, or a slow disk does: SQLite's own five end a run.
_PATIENCE = 60
_MAKING = ".making-"  # begins the name of a folder in which a store is made


def local_store(root: Path) -> str:
    """The URI of the store, made when it is not there; tidies up after a process that was killed while it made it."""
    database = root / DATABASE
    if not database.exists() or any(root.glob(f"{_MAKING}*")):
        root.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root):
            for left in root.glob(f"{_MAKING}*"):
                shutil.rmtree(left, ignore_errors=True)
            _make_store(root)
    return database_uri(database)


def database_uri(file: Path) -> str:
    """The URI of an SQLite database whose users wait for one another."""
    return f"sqlite:///{file}?timeout={_PATIENCE}"


def _make_store(root: Path) -> None:
    database = root / DATABASE
    if not database.exists():
        # MLflow migrates a new database for seconds, without a lock: a second process, or an end in between, would
        # leave it broken for good. So it is made aside, and whoever is first puts a whole one in place.
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
    """Makes an empty database with MLflow's tables, without its lines about every one of them."""
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
