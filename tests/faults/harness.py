"""Kills a fit again and again, resumes it, and compares it with one that nothing happened to.

A *life* is a process, forked from one that has imported everything, that runs the command line's `fit` until it is
ended; the next life resumes from the last checkpoint. Lives follow one another until one of them comes to its end.

    python -m tests.faults.harness --kills 1000 --seed 0
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from tests.faults.places import PLACES, counted, full, kill, limit_files

from instructedit import stores
from instructedit.editors.saved import read_checkpoint
from instructedit.lightning_cli import run
from instructedit.lm.cache import partition
from instructedit.testbed.corpus import documents
from instructedit.testbed.pretrain import Recipe, new_model, train_tokenizer
from instructedit.tracking import runs

STEPS, EVERY, VALIDATE = 6, 1, 2
_PROGRESS = "progress"
Act = Callable[[], None]


def prepare(folder: Path) -> None:
    """Makes the model that every life trains on, and what is slow and the same in each of them."""
    tokenizer = train_tokenizer(documents(0, 1), 600, 128)
    torch.manual_seed(0)
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    from mlflow.store.db import utils

    utils._get_latest_schema_revision = functools.cache(utils._get_latest_schema_revision)
    partition.SHARD_BYTES = 1  # every row is written at once
    make, template = stores.make_database, folder / "template.db"
    make(template)
    stores.make_database = lambda file: shutil.copy(template, file) and None


class Progress(L.Callback):
    """Notes the step that begins: whatever came before it must be in a checkpoint by now."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        Path(_PROGRESS).write_text(str(trainer.global_step))


def arguments(lm: Path, on_disk: bool = True) -> list[str]:
    """The command line of every life, in whose folder the store is, and the cache unless it is in memory alone."""
    return [
        "fit", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--guards.base_records=0",
        "--trainer.enable_model_summary=false", f"--model.lm.name={lm}", f"--trainer.max_steps={STEPS}",
        "--model.editor=InstructEdit", "--model.editor.rank=4", "--model.editor.edit_rate=1e-2", "--model.lr=1e-3",
        *(["--model.lm.cache_dir=cache"] if on_disk else []),
        "--data.train=[{name: counterfact, size: 5}, {name: recent, size: 4}]",
        "--data.batch_size=3", "--data.val_size=2", f"--trainer.val_check_interval={VALIDATE}",
        f"--checkpoint.every_n_train_steps={EVERY}", "--trainer.log_every_n_steps=1",
    ]  # fmt: skip


def last_checkpoint(folder: Path) -> Path | None:
    """The newest last state in the store, of whichever run."""
    found = sorted(folder.glob("mlruns/*/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    return found[-1] if found else None


def life(folder: Path, lm: Path, act: Act, after: float | None = None, on_disk: bool = True) -> int:
    """One process that begins or resumes a fit; gives its wait status.

    Args:
        folder: Where it works.
        lm: Folder of the model.
        act: What it does to itself before it starts.
        after: Seconds after which it is killed from outside, where it is.
        on_disk: Keep the prefix cache on disk too.
    """
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = Path("log").open("a")  # noqa: SIM115
            act()
            warnings.simplefilter("ignore")
            checkpoint = last_checkpoint(folder)
            resume = [f"--ckpt_path={checkpoint}"] if checkpoint else []
            run([*arguments(lm, on_disk), *resume], callbacks=[Progress()])
            status = 0
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(status)
    if after is None:
        return os.waitpid(pid, 0)[1]
    end = time.monotonic() + after
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def check_after_an_end(folder: Path) -> None:
    """What must hold whenever a life ended, however it did."""
    begun = int((folder / _PROGRESS).read_text() or 0) if (folder / _PROGRESS).is_file() else 0
    for file in folder.glob("mlruns/*/*/checkpoints/*.ckpt"):
        read_checkpoint(file)  # whole, and with the checksum that it was written with
    checkpoint = last_checkpoint(folder)
    kept = torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint else 0
    assert kept >= begun - begun % EVERY, f"step {begun} had begun, and the last checkpoint is of step {kept}"


def outcome(folder: Path) -> dict[str, Any]:
    """What a run that came to its end left behind: all that must not depend on what happened to it."""
    checkpoint = last_checkpoint(folder)
    assert checkpoint
    saved = torch.load(checkpoint, weights_only=True)
    (best,) = (state for key, state in saved["callbacks"].items() if key.startswith("Checkpoint"))
    table = runs(root=folder / "mlruns")
    (finished,) = table[table["status"] == "FINISHED"].to_dict("records")
    assert finished["run_id"] == checkpoint.parent.parent.name
    assert set(table["status"]) <= {"FINISHED", "KILLED", "FAILED"}, "a run that is dead is said to be running"
    assert Path(best["best_model_path"]).is_file()
    return {
        "step": saved["global_step"], "state_dict": saved["state_dict"], "optimizers": saved["optimizer_states"],
        "best score": float(best["best_model_score"]), "best": Path(best["best_model_path"]).name,
        "metrics": {k: v for k, v in finished.items() if k.startswith("metrics.") and "time" not in k},
    }  # fmt: skip


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{place} differs by {(one - other).abs().max()}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{place}: {one.keys() ^ other.keys()}"
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}/{i}")
    else:
        assert one == other or one != one, f"{place}: {one!r} is not {other!r}"


def fate(rng: random.Random, whole: float) -> tuple[str, Act, float | None]:
    """What happens to a life: (in words, what it does to itself, after how many seconds it is killed)."""
    sort = rng.random()
    if sort < 0.3:
        return "at a point in time", lambda: None, rng.uniform(0, whole)
    if sort < 0.4:
        size = rng.randrange(1, 60_000)
        return "files limited", lambda: limit_files(size), None
    name = rng.choice(list(PLACES))
    put, most = PLACES[name]
    number = rng.randint(1, most)
    end = full if sort < 0.5 and "checkpoint" in name else kill
    return f"{name}{' (disk full)' if end is full else ''}", lambda: put(counted(number, end)), None


def trial(folder: Path, lm: Path, rng: random.Random, whole: float, most: int) -> Counter[str]:
    """Runs lives until one comes to its end, the last one unharmed; counts the ends by what brought them about.

    Half of the trials have their prefix cache on disk: what it holds must make no difference.
    """
    ends: Counter[str] = Counter()
    on_disk = rng.random() < 0.5
    while True:
        words, act, after = fate(rng, whole) if ends.total() < most else ("", lambda: None, None)
        status = life(folder, lm, act, after, on_disk)
        check_after_an_end(folder)
        if status == 0:
            return ends
        assert words, f"a life that nothing happened to failed: {(folder / 'log').read_text()[-2000:]}"
        ends[words] += 1


def main(kills: int, seed: int, folder: Path, at_once: int = 4) -> Counter[str]:
    """Brings about so many ends; raises AssertionError where something was lost."""
    rng = random.Random(seed)
    prepare(folder)
    reference = folder / "reference"
    reference.mkdir()
    began = time.monotonic()
    status = life(reference, folder / "lm", lambda: None)
    assert status == 0, (reference / "log").read_text()[-2000:]
    whole, expected, ends = time.monotonic() - began, outcome(reference), Counter()
    numbers = itertools.count()
    while ends.total() < kills:
        # Never the same folder: what this process has open of a store would be open in the lives.
        place = folder / f"trial-{next(numbers)}"
        place.mkdir()
        ends += trial(place, folder / "lm", rng, whole, min(at_once, kills - ends.total()))
        assert_same(expected, outcome(place))
        shutil.rmtree(place)
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="results must be the same with any number")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        found = main(options.kills, options.seed, Path(made))
    for words, count in found.most_common():
        print(f"{count:5}  {words}")
    print(f"{found.total()} ends in {time.monotonic() - started:.0f} s: nothing lost, every result the same")
