"""Disks that take nothing, and disks that are slow."""

from __future__ import annotations

import sqlite3
import threading
import time

import pytest
from tests.faults.harness import arguments, last_checkpoint, prepare

from instructedit import stores
from instructedit.cli import main
from instructedit.lightning_cli import run
from instructedit.lm.cache import partition
from instructedit.tracking import runs

#: A folder that nobody, not even root, can write to.
NOWHERE = "/proc/nowhere"
EDIT = ["edit", "--editor=ft_l", "--prompt=a", "--target=b"]


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "--scale=tiny", "--editor=mend", f"--trainer.logger.init_args.root={NOWHERE}"],
        ["experiment", "demo", "--root", NOWHERE],
        ["experiment", "demo", "--out", NOWHERE],
        ["benchmark", "--json", f"{NOWHERE}.json"],
        [*EDIT, "--save", NOWHERE],
        [*EDIT, "--merge", NOWHERE],
        [*EDIT, "--html", f"{NOWHERE}.html"],
        [*EDIT, "--keep=a", "--store", NOWHERE],
        ["new-task", NOWHERE],
    ],
    ids=lambda args: " ".join(args[:1] + args[-2:]),
)
def test_a_disk_that_takes_nothing_is_found_out_before_any_work(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    assert main(args) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("instructedit: error: ")
    assert NOWHERE in last
    assert time.monotonic() - began < 60  # a training takes minutes


def test_a_disk_on_which_the_store_answers_late_loses_nothing(tmp_path, monkeypatch):
    """For most of the fit somebody else holds the store's database, seconds at a time."""
    for owner, name in ((stores, "make_database"), (partition, "SHARD_BYTES")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # what the harness sets is taken back
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    database = tmp_path / "mlruns/mlflow.db"
    over, held = threading.Event(), []

    def hold():
        while not database.exists():
            time.sleep(0.01)
        while not over.is_set():
            with sqlite3.connect(database, timeout=60, isolation_level=None) as store:
                store.execute("BEGIN EXCLUSIVE")
                time.sleep(6)
                store.execute("COMMIT")
            held.append(6)
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        run([*arguments(tmp_path / "lm"), "--trainer.max_steps=2"])
    finally:
        over.set()
        holder.join()
    assert held
    (row,) = runs(root=tmp_path / "mlruns").to_dict("records")
    assert row["status"] == "FINISHED"
    assert row["metrics.train/loss"] == row["metrics.train/loss"]
    assert last_checkpoint(tmp_path)
