"""What tells dead runs from living ones, and lets one process at a time do a thing; and secrets that are taken out."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from instructedit import stores, tracking
from instructedit.errors import UserError
from instructedit.experiments import search
from instructedit.locks import Alive, dead, one_at_a_time
from instructedit.redaction import redacted
from instructedit.tracking import MLflowTracker, _client, unfinished_run


def child(work):
    """A process that does the work and then waits to be killed; given once the work is done."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            kept = work()
            os.write(write, b"x")
            time.sleep(60)
            del kept
        finally:
            os._exit(1)
    assert os.read(read, 1) == b"x"
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_run_is_dead_when_its_process_is(tmp_path):
    own = Alive(tmp_path, "own")
    pid = child(lambda: Alive(tmp_path, "other"))
    assert list(dead(tmp_path)) == []
    kill(pid)
    assert list(dead(tmp_path)) == ["other"]
    assert list(dead(tmp_path)) == []  # told once
    own.end()
    assert not list((tmp_path / "running").iterdir())


def test_a_run_that_is_about_to_begin_is_not_dead(tmp_path):
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / ".new").touch()  # made, and not locked yet
    assert list(dead(tmp_path)) == []


@pytest.mark.parametrize("place", ["folder", "file"])
def test_one_at_a_time(tmp_path, place, capsys):
    lock = tmp_path if place == "folder" else tmp_path / "lock"

    def held():
        context = one_at_a_time(lock)
        context.__enter__()
        return context

    pid = child(held)
    began = os.fork()
    if not began:
        with one_at_a_time(lock):
            (tmp_path / "in").touch()
        os._exit(0)
    time.sleep(0.3)
    assert not (tmp_path / "in").exists()
    kill(pid)
    assert os.waitpid(began, 0)[1] == 0
    assert (tmp_path / "in").exists()


def test_a_search_holds_the_lock_of_its_store(tmp_path, monkeypatch):
    """So that a second one does not take the first one's trials for lost ones."""

    def searched(searching):
        with (tmp_path / "searches.lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "table"

    monkeypatch.setattr(search, "_searched", searched)
    experiment = SimpleNamespace(root=tmp_path, grid=SimpleNamespace(search=object()))
    assert search.search(experiment, None) == "table"


# -- in the store --------------------------------------------------------------------------------------------------


def test_a_killed_run_is_marked_when_the_next_starts(tmp_path):
    def begun():
        tracker = MLflowTracker(root=tmp_path, run_name="killed")
        _ = tracker.experiment
        (tmp_path / "id").write_text(tracker.run_id)
        return tracker

    stores.local_store(tmp_path)  # before the fork
    pid = child(begun)
    run_id = (tmp_path / "id").read_text()
    status = lambda: _client(tmp_path).get_run(run_id).info.status  # noqa: E731
    with MLflowTracker(root=tmp_path):
        assert status() == "RUNNING"  # it is alive
    kill(pid)
    assert status() == "RUNNING"
    with MLflowTracker(root=tmp_path):
        assert status() == "KILLED"
    place = tmp_path / "1" / run_id / "checkpoints" / "last.ckpt"
    assert unfinished_run(place, tmp_path) == run_id
    assert unfinished_run(Path("elsewhere/last.ckpt"), tmp_path) is None
    assert unfinished_run(tmp_path / "1" / "0" / "checkpoints" / "last.ckpt", tmp_path) is None


def test_a_finished_run_does_not_go_on(tmp_path):
    with MLflowTracker(root=tmp_path) as tracker:
        place = tmp_path / "1" / tracker.run_id / "checkpoints" / "last.ckpt"
        assert unfinished_run(place, tmp_path) is None  # it is alive
    assert unfinished_run(place, tmp_path) is None


def test_a_process_killed_while_it_made_the_store_leaves_nothing(tmp_path, monkeypatch):
    made = stores.make_database

    def slow(file):
        file.write_bytes(b"half")
        os.write(write, b"x")
        time.sleep(60)

    read, write = os.pipe()
    monkeypatch.setattr(stores, "make_database", slow)
    pid = os.fork()
    if not pid:
        try:
            stores.local_store(tmp_path)
        finally:
            os._exit(1)
    os.read(read, 1)
    kill(pid)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(stores, "make_database", made)
    stores.local_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


# -- secrets -------------------------------------------------------------------------------------------------------

SECRETS = {
    "postgresql://me:hunter2@db.example/mlflow": "postgresql://***@db.example/mlflow",
    "mysql://me:p@ss:w@db/x": "mysql://***@db/x",
    "mysql://me:p/ss@db:3306/x": "mysql://***@db:3306/x",
    "http://h:80,postgresql://me:p/ss@db/x": "http://h:80,postgresql://***@db/x",
    "https://hunter2@host/api": "https://***@host/api",
    "mssql://host/x?user=me&password=hunter2&ssl=1": "mssql://host/x?user=me&password=***&ssl=1",
    "https://h/?API_KEY=hunter2": "https://h/?API_KEY=***",
    "sqlite:////tmp/a b/mlflow.db": "sqlite:////tmp/a b/mlflow.db",
    "http://127.0.0.1:5000/@x and me@example.org": "http://127.0.0.1:5000/@x and me@example.org",
    "name: a, tokens: 3": "name: a, tokens: 3",
}


@pytest.mark.parametrize(("text", "left"), SECRETS.items())
def test_secrets_are_taken_out_of_addresses(text, left):
    assert redacted(text) == left
    assert redacted(f"uri: '{text}'\nname: x") == f"uri: '{left}'\nname: x"


def test_a_password_is_not_in_the_logged_configuration(tmp_path):
    class Parser:
        def dump(self, config, **_):
            return yaml.safe_dump(config)

    class Keeper(tracking.MLflowTracker):
        def __init__(self):
            self.texts = {}

        def has(self, name):
            return False

        def log_text(self, text, name):
            self.texts[name] = text

    keeper = Keeper()
    trainer = type("Trainer", (), {"loggers": [keeper], "global_step": 0})
    config = {"trainer": {"logger": {"init_args": {"tracking_uri": "postgresql://me:hunter2@db/x"}}}}
    tracking.SaveConfig(Parser(), config).save_config(trainer, None, "fit")
    assert "hunter2" not in keeper.texts["config.yaml"]
    assert "@db/x" in keeper.texts["config.yaml"]


def test_nor_in_the_error_about_a_run_that_is_not_there(tmp_path, monkeypatch):
    with MLflowTracker(root=tmp_path) as tracker:
        client = tracker.experiment
    with pytest.raises(UserError, match=r"postgresql://\*\*\*@db/x: no run"):
        tracking._run(client, "0" * 32, "postgresql://me:hunter2@db/x")
