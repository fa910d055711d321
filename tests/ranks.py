"""Several processes that train together (gloo), forked from the test: nothing is imported twice."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch import distributed


def forked(work, count, seconds=240):
    """Runs ``work(number)`` in that many forked processes at once; gives what each returned, in order."""
    with tempfile.TemporaryDirectory() as folder:
        pids = [os.fork() or _child(work, number, folder) for number in range(count)]
        ends, left = time.monotonic() + seconds, set(pids)
        while left and time.monotonic() < ends:
            left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        missing = [number for number in range(count) if not Path(folder, str(number)).is_file()]
        assert not missing, f"processes {missing} of {count} did not come to an end"
        return [torch.load(Path(folder, str(number)), weights_only=False) for number in range(count)]


def _child(work, number, folder):
    try:
        torch.set_num_threads(1)
        torch.save(work(number), Path(folder, f"part-{number}"))
        Path(folder, f"part-{number}").rename(Path(folder, str(number)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)


def in_ranks(world, work, seconds=240):
    """The same with a process group: ``work(rank)`` in each."""
    with tempfile.TemporaryDirectory() as meeting:

        def joined(rank):
            distributed.init_process_group("gloo", f"file://{meeting}/store", rank=rank, world_size=world)
            return work(rank)

        return forked(joined, world, seconds)


def as_torchrun(rank, world, port):
    """Sets what torchrun tells a process of its place."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    more = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in (place | more).items()})


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
