"""Load: many processes on one store and one cache, many visitors of the page, many edits in flat memory.

python -m tests.load --edits 100000 --processes 8
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from tests.faults.harness import arguments, prepare
from tests.ranks import forked, free_port

import instructedit as ie
from instructedit.editors.saved import read_checkpoint
from instructedit.evaluation import Evaluation, evaluate_batch
from instructedit.lightning_cli import run
from instructedit.tracking import runs

QUICK = Evaluation(generate=False, fluency_tokens=0)
BATCH = 32


def records() -> Iterator[ie.EditRecord]:
    """Records without end, no prompt twice."""
    for number in itertools.count():
        request = ie.EditRequest(f"The number {number} stands for", ("cats", "the sea")[number % 2], "counterfact")
        probes = (
            ie.Probe("generalization", f"What does {number} stand for?", (request.target,)),
            ie.Probe("locality", f"After {number} comes", ("one",)),
        )
        yield ie.EditRecord(f"r{number}", request, probes)


def memory() -> float:
    """Megabytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def stream(lm: Any, edits: int) -> list[tuple[int, float, float]]:
    """Scores so many edits, batch after batch; (edits so far, megabytes, seconds) at each tenth."""
    editor, stream = ie.build_editor("mend", lm, rank=4), records()
    began, seen = time.monotonic(), []
    for done in range(BATCH, edits + 1, BATCH):
        rows = evaluate_batch(lm, editor, list(itertools.islice(stream, BATCH)), QUICK).rows
        assert len({row["record"] for row in rows}) == BATCH
        if done * 10 // edits > (done - BATCH) * 10 // edits:
            seen.append((done, memory(), time.monotonic() - began))
    return seen


def growth(seen: list[tuple[int, float, float]]) -> float:
    """Megabytes between a fifth of the way, when caches are full, and the end."""
    return seen[-1][1] - seen[1][1]


def together(folder: Path, processes: int) -> int:
    """Fits in so many processes at once on one store and one cache; gives the number of their runs."""

    def work(number: int) -> int:
        warnings.simplefilter("ignore")
        name = f"--trainer.logger.init_args.run_name=run-{number}"
        run([*arguments(folder / "lm"), "--trainer.max_steps=2", f"--seed_everything={number}", name])
        return number

    done = forked(work, processes, seconds=1200)
    table = runs(root=folder / "mlruns")
    assert done == list(range(processes))
    assert sorted(table["name"]) == sorted(f"run-{number}" for number in range(processes))
    assert set(table["status"]) == {"FINISHED"}
    for file in folder.glob("mlruns/*/*/checkpoints/last.ckpt"):
        read_checkpoint(file)
    return len(table)


def visitors(count: int, folder: Path) -> float:
    """So many visitors of the page at once, each with an edit of its own; gives the seconds that the last one waited.

    Each must see the report of its own edit, keep it under its own name, and get that one as a file.
    """
    from gradio_client import Client

    from instructedit.commands.ui import HOST, page
    from instructedit.reports.workbench import Workbench

    blocks = page(Workbench(folder / "edits", ("tiny",)))
    _, address, _ = blocks.launch(server_name=HOST, server_port=free_port(), quiet=True, prevent_thread_lock=True)
    began = time.monotonic()

    def visit(number: int) -> str:
        client = Client(address, verbose=False, download_files=str(folder / f"visitor-{number}"))
        request = ("tiny", "ft_l", "The capital of France is", f"number {number}", "", "", "")
        report = client.predict(*request, api_name="/edit")
        assert f"number {number}" in report
        client.predict(f"visitor-{number}", api_name="/keep")
        with ZipFile(client.predict(api_name="/pack")) as packed:
            requests = next(name for name in packed.namelist() if name.endswith("requests.json"))
            assert f"number {number}" in packed.read(requests).decode()
        return str(report)

    with ThreadPoolExecutor(count) as pool:
        reports = list(pool.map(visit, range(count)))
    assert len(set(reports)) == count
    assert sorted(each.name for each in (folder / "edits").iterdir()) == sorted(f"visitor-{n}" for n in range(count))
    blocks.close()
    return time.monotonic() - began


if __name__ == "__main__":
    import os

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--visitors", type=int, default=20, help="of the page; needs the extra ui")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        prepare(Path(made))
        started = time.monotonic()
        count = together(Path(made), options.processes)
        print(f"{count} fits at once on one store and one cache: all finished, {time.monotonic() - started:.0f} s")
        if options.visitors:
            waited = visitors(options.visitors, Path(made))
            print(f"{options.visitors} visitors of the page at once: each edited, kept and got its own, {waited:.0f} s")
        model = ie.FrozenLM.from_pretrained("lm", cache_bytes=8 << 20)
        figures = stream(model, options.edits)
        for edits, megabytes, seconds in figures:
            print(f"{edits:8} edits {megabytes:8.0f} MB {edits / seconds:8.0f} edits/s")
        print(f"memory grew by {growth(figures):.1f} MB over the last four fifths")
