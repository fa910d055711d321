"""README's commands for two processes, run on a small model, beside one process with the same global batch.

    python -m tests.two_ranks --steps 20

Each command is a process of its own, which starts its second one itself. The fit of two is ended half way by SIGKILL
and goes on by README's second command; what comes of it is compared with the fit of one process, never disturbed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from mlflow import MlflowClient
from tests.pages import REPOSITORY

from instructedit.tracking import runs

#: Of the global batch; README's model is replaced by the embedded one, on a CPU.
BATCH = 8
FEW = "[{name: counterfact, size: 20}, {name: zsre, size: 21}]"


def commands() -> list[list[str]]:
    """Arguments of README's three commands: fit, go on, test."""
    text = REPOSITORY.joinpath("README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^instructedit (\w+ .*--trainer.devices 2 .*)$", text, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["fit", "fit", "test"], lines
    return [shlex.split(line.replace("gpt2-xl", "tiny"), comments=True) for line in lines]


def without_second(args: list[str]) -> list[str]:
    """The same command for one process."""
    return [arg for arg in args if arg not in ("--trainer.devices", "2", "--trainer.strategy", "ddp")]


def start(args: list[str], root: Path, checkpoint: Path | None, *more: str) -> subprocess.Popen[bytes]:
    """Starts a command in a folder of its own."""
    root.mkdir(exist_ok=True)
    args = [str(checkpoint) if arg.startswith("mlruns/1/<run>") else arg for arg in args]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    line = [sys.executable, "-m", "instructedit.cli", *args, *quiet, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    log = (root / "log").open("ab")
    return subprocess.Popen(line, cwd=root, stdout=log, stderr=log, env=environment, start_new_session=True)


def ended(process: subprocess.Popen[bytes], root: Path) -> None:
    """Waits for a command's end.

    Raises:
        AssertionError: If its status is not 0.
    """
    assert process.wait() == 0, (root / "log").read_text()[-3000:]


def checkpoint_of(root: Path) -> Path:
    """The last state of the newest fit."""
    return max(root.glob("mlruns/*/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)


def state(root: Path) -> dict[str, torch.Tensor]:
    """What a fit trained."""
    weights: dict[str, torch.Tensor] = torch.load(checkpoint_of(root), weights_only=True)["state_dict"]
    return weights


def kill_after(process: subprocess.Popen[bytes], root: Path, step: int) -> int:
    """Kills a fit and its second process once a checkpoint of the step is there; gives that checkpoint's step."""
    while process.poll() is None:
        found = list(root.glob("mlruns/*/*/checkpoints/last.ckpt"))
        if found and (at := torch.load(found[0], weights_only=True)["global_step"]) >= step:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return int(at)
        time.sleep(0.05)
    raise AssertionError((root / "log").read_text()[-3000:])


def losses(root: Path) -> list[float]:
    """The training loss of each step."""
    table = runs(root=root / "mlruns")
    fit = table[table["name"].str.startswith("fit")].iloc[-1]
    history = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db").get_metric_history(fit["run_id"], "train/loss")
    return [metric.value for metric in sorted(history, key=lambda metric: metric.step)]


def tested(root: Path) -> dict[str, float]:
    """What the test logged."""
    table = runs(root=root / "mlruns")
    test = table[table["name"].str.startswith("test")].iloc[-1]
    names = [name for name in table.columns if name.startswith("metrics.test/") and test[name] == test[name]]
    return {name: float(test[name]) for name in names}


def main(steps: int, folder: Path) -> None:
    """Runs and compares; prints a line for each comparison."""
    fit, go_on, test = commands()
    common = [
        f"--data.train={FEW}",
        "--data.val_size=4",
        "--guards.base_records=0",
        "--checkpoint.every_n_train_steps=1",
    ]
    train = [*common, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    score = ["--data.test=" + FEW, "--results.show=false"]
    two, one, half = folder / "two", folder / "one", f"--data.batch_size={BATCH // 2}"
    at = kill_after(start(fit, two, None, *train, half), two, steps // 2)
    ended(start(go_on, two, checkpoint_of(two), *train, half), two)
    ended(start(without_second(fit), one, None, *train, f"--data.batch_size={BATCH}"), one)
    apart = {
        name: (value - state(two)[name]).norm() / value.norm() for name, value in state(one).items() if value.norm()
    }
    print(f"fit of two, killed after step {at} of {steps} and gone on with, beside one process:")
    print(f"  the editor's tensors are {float(max(apart.values())):.1e} of their norm apart, at most")
    pairs = list(zip(losses(one), losses(two), strict=True))
    most = max(abs(a - b) / abs(a) for a, b in pairs)
    print(f"  the losses of {len(pairs)} steps differ by {most:.1e} of them, at most")
    ended(start(test, two, checkpoint_of(two), *score), two)
    ended(start(without_second(test), one, checkpoint_of(two), *score), one)
    alone, both = tested(one), tested(two)
    assert alone.keys() == both.keys()
    print(f"test of that editor by two and by one process: {len(alone)} scores of {FEW.count('size')} tasks differ by")
    print(f"  {max(abs(alone[name] - both[name]) for name in alone):.1e} points, at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        main(options.steps, Path(made))
