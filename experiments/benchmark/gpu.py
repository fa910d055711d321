"""Measures the engine on a machine with one GPU, in under ten minutes: tests, speed at large shapes, two trainings.

    make gpu                                        # or: python experiments/benchmark/gpu.py --out outputs/gpu
    python experiments/benchmark/gpu.py --device cpu  # the dry run: the same steps, small, on a CPU

Each step is a process with a time limit of its own. One that fails or takes too long is said, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

#: What `python -c` runs as the command line of this very environment.
CLI = (sys.executable, "-c", "import sys; from instructedit.cli import main; sys.exit(main(sys.argv[1:]))")
#: Lines of a failed step's output that are kept.
_TAIL = 5


@dataclass(frozen=True)
class Step:
    """One process of the run.

    Attributes:
        name: Shown in the table.
        command: Its words.
        limit: Seconds that it may take.
        figures: File that it writes its figures to, if any.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    figures: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step: `state` is ``done``, ``failed`` or ``out of time``; `tail` ends a failed one's output."""

    name: str
    state: str
    seconds: float
    tail: str = ""


def steps(device: str, out: Path) -> list[Step]:
    """The steps for a device, whose limits together stay below ten minutes; on a CPU everything is small."""
    gpu = device != "cpu"
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", *(() if gpu else ("--collect-only",)), "tests/gpu")
    found = [Step("tests", tests, 60)]
    shapes = (("gpt2-xl", 100), ("llama-2-7b", 130)) if gpu else (("6x256", 150),)
    edits = (
        ("--edits", "64", "--batch", "64", "--repeats", "3")
        if gpu
        else ("--edits", "2", "--repeats", "1", "--rank", "8")
    )
    for shape, limit in shapes:
        file = out / f"{shape}.json"
        options = ("--shapes", f"[{shape}]", "--device", device, "--measures", "[train]", "--json", str(file), *edits)
        found.append(Step(f"benchmark {shape}", (*CLI, "benchmark", *options), limit, file))
    trainer = ["--trainer.accelerator=gpu", "--trainer.max_steps=1000", "--trainer.val_check_interval=1000"]
    small = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    for editor in ("instructedit", "mend"):
        scale = "smollm2-135m" if gpu else "tiny"
        logged = f"--trainer.logger.init_args.tracking_uri=sqlite:///{out / 'runs.db'}"
        command = (*CLI, "fit", "--scale", scale, "--editor", editor, logged, *(trainer if gpu else small))
        found.append(Step(f"train {editor} on {scale}", command, 120))
    return found


def run(step: Step) -> Outcome:
    """Runs a step within its limit; its children end with it."""
    began = time.monotonic()
    process = subprocess.Popen(
        step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=step.limit)
        state = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, state = process.communicate()[0], "out of time"
    tail = "" if state == "done" else "\n".join(output.strip().splitlines()[-_TAIL:])
    return Outcome(step.name, state, round(time.monotonic() - began, 1), tail)


def report(found: Sequence[tuple[Step, Outcome]], out: Path) -> str:
    """Writes everything to ``gpu.json``, and returns it as a Markdown table."""
    lines = ["| step | state | seconds | figures |", "| --- | --- | ---: | --- |"]
    everything = []
    for step, outcome in found:
        ours = step.figures and step.figures.is_file()
        figures = json.loads(step.figures.read_text()) if ours and step.figures else {}
        rows = figures.get("rows", [])
        short = "; ".join(
            f"{r['variant']} {r['rate']:.2f} {r['unit']} (× {r['ratio']:.1f}, {100 * r['floor_share']:.0f} % of the "
            f"floor, {r['memory_mb']:.0f} MB)"
            for r in rows
        )
        lines.append(f"| {step.name} | {outcome.state} | {outcome.seconds:.0f} | {short} |")
        everything.append({**asdict(outcome), "figures": figures})
    (out / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all steps; the exit status is 1 if one of them is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a small dry run")
    parser.add_argument("--out", default="outputs/gpu", type=Path, help="folder for gpu.json and the runs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for step in steps(options.device, options.out.resolve()):
        print(f"{step.name} (at most {step.limit:.0f} s) …", flush=True)
        found.append((step, run(step)))
        if found[-1][1].tail:
            print(found[-1][1].tail, file=sys.stderr)
    table = report(found, options.out)
    (options.out / "gpu.md").write_text(table + "\n")
    print(table)
    return int(any(outcome.state != "done" for _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
