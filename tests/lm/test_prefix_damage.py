"""The prefix cache on disk when files are damaged, the disk is full, or processes share it and are killed."""

import json
import multiprocessing
import os
import signal
import time
import warnings

import pytest
import torch
from tests.lm.prefixes import FORWARD, ROWS, asked, equal, filled, opened, shards

from instructedit.lm.cache import disk, partition
from instructedit.lm.cache.folder import META, clear, evict, partitions

# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 0.3, 0.99])
def test_a_truncated_segment_is_dropped_and_said(lm, tmp_path, keep):
    first = filled(lm, tmp_path)
    (file,) = shards(tmp_path)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    again = opened(lm, tmp_path)
    with pytest.warns(UserWarning, match=f"{file.name}: corrupt .*computed anew") as said:
        assert equal(asked(again), first)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert (again.cache.misses, file.exists()) == (4, False)
    again.cache.flush()
    assert equal(asked(opened(lm, tmp_path)), first)


def test_a_flipped_bit_is_never_read(lm, tmp_path, monkeypatch):
    """Anywhere in the file: the header, the index, the states."""
    monkeypatch.setattr(disk, "_flush", lambda partitions: None)  # no other segment gives the rows
    writer = opened(lm, tmp_path)
    first = asked(writer)
    writer.cache.disk.partition(FORWARD, 2).flush()
    (file,) = shards(tmp_path)
    raw, about = file.read_bytes(), writer._cache_identity()
    size = 8 + int.from_bytes(raw[:8], "little")
    for place in (*range(size), *range(size, len(raw), 37)):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << place % 8)]) + raw[place + 1 :])
        again = opened(lm, tmp_path)
        again.cache.disk._model = lambda: about  # the weights need no second look
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = asked(again)
        if file.exists():  # then what was flipped says nothing: a space that fills up the header
            assert (place < size, raw[place : place + 1], said) == (True, b" ", [])
            assert equal(found, first)
        assert len(said) == (not file.exists())
        for states, expected in zip(found, first, strict=True):  # rows that were computed anew, in other company
            torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-4)


def test_a_lost_description_loses_no_states(lm, tmp_path):
    first = filled(lm, tmp_path)
    (meta,) = tmp_path.rglob(META)
    about = json.loads(meta.read_text())
    assert about["lm"] == lm.name
    assert (about["block"], about["dtype"], about["hidden"], about["bytes_per_token"]) == (2, "float32", 32, 128)
    meta.write_text("{")
    again = opened(lm, tmp_path)
    assert equal(asked(again), first)
    assert again.cache.misses == 0
    assert partitions(tmp_path)[0].meta == {}
    asked(again, [[1, 2, 3]])
    again.cache.flush()
    assert json.loads(meta.read_text()) == about  # the next segment brings it back


def test_a_model_under_another_name_is_found_by_the_new_one(lm, tmp_path):
    filled(lm, tmp_path)
    lm.name = "renamed"
    filled(lm, tmp_path, [[1, 2, 3]])
    assert [one.meta["lm"] for one in partitions(tmp_path)] == ["renamed"]
    assert clear(tmp_path, "renamed")
    assert not partitions(tmp_path)


def test_a_full_disk_ends_the_writing_and_not_the_run(lm, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    expected, cached = asked(lm), opened(lm, tmp_path)
    monkeypatch.setattr(partition.Path, "write_bytes", full)
    assert equal(asked(cached), expected)
    with pytest.warns(UserWarning, match="No space left"):
        cached.cache.flush()
    assert cached.cache.disk.broken
    assert equal(asked(cached, ROWS[::-1]), expected[::-1])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [META]


# -- several processes ---------------------------------------------------------------------------------------------


def _works(folder, lm, order, start, results):
    """Another process: asks for rows again and again, writing and reading, and tells the states and its misses."""
    torch.set_num_threads(1)
    mine = opened(lm, folder, cache_bytes=0)
    start.wait()
    for _ in range(3):
        for i in order:
            asked(mine, [[i, i + 1, i + 2]])
            mine.cache.flush()
    results.put(([asked(mine, [[i, i + 1, i + 2]])[0].numpy() for i in range(30)], mine.cache.misses))


def test_two_processes_write_and_read_one_folder_at_once(lm, tmp_path):
    context = multiprocessing.get_context("fork")
    results, start = context.Queue(), context.Barrier(2)
    orders = (range(30), range(29, -1, -1))
    workers = [context.Process(target=_works, args=(tmp_path, lm, order, start, results)) for order in orders]
    for worker in workers:
        worker.start()
    told = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = [asked(lm, [[i, i + 1, i + 2]])[0].numpy() for i in range(30)]
    for states, misses in told:
        assert all((a == b).all() for a, b in zip(states, expected, strict=True))
        assert misses <= 30  # nothing twice
    third = opened(lm, tmp_path)
    asked(third, [[i, i + 1, i + 2] for i in range(30)])
    assert third.cache.misses == 0


def _writes_forever(folder, lm):
    torch.set_num_threads(1)
    mine = opened(lm, folder)
    number = 0
    while True:
        asked(mine, [[1 + number % 500, 1 + number // 500, 3]])
        number += 1
        if number % 4 == 0:
            mine.cache.flush()


def test_a_process_killed_while_it_writes_leaves_a_usable_store(lm, tmp_path):
    for wait in (0.3, 0.37, 0.45):
        process = multiprocessing.get_context("fork").Process(target=_writes_forever, args=(tmp_path, lm))
        process.start()
        while not shards(tmp_path):
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    again = opened(lm, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whatever is there is whole
        found = asked(again, [[1 + i, 1, 3] for i in range(8)])
    assert again.cache.misses == 0
    for i, states in enumerate(found):
        torch.testing.assert_close(states, asked(lm, [[1 + i, 1, 3]])[0], atol=2e-5, rtol=1e-4)


def test_a_kill_between_writing_and_publishing_leaves_a_part_that_nobody_reads(lm, tmp_path, monkeypatch):
    first = filled(lm, tmp_path)
    (file,) = shards(tmp_path)
    part = file.with_suffix(".part")
    file.rename(part)
    part.write_bytes(part.read_bytes()[:1000])
    again = opened(lm, tmp_path)
    assert equal(asked(again), first)
    assert again.cache.misses == 4
    evict(tmp_path, 1 << 30)
    assert part.exists()  # somebody may be writing it
    os.utime(part, (1, 1))
    evict(tmp_path, 1 << 30)
    assert not part.exists()
