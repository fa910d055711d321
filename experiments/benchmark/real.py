"""How fast a real model is trained on and tested, by this code and by another copy of it, in turn.

    python experiments/benchmark/real.py --lm smollm2-135m --before ../older/src

Each run is a process of its own: InstructEdit as the paper has it (rank 1920, three blocks, instructions) on the real
records in ``data/``. The other copy may be as old as commit b5b3d88; it computes in float32, this one in ``--dtype``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
#: Task to its file and the part to train on.
FILES = {
    "counterfact": ("counterfact/train_cf.json", "train[:95%]"),
    "recent": ("recent/recent_train.json", "train[:95%]"),
    "convsent": ("convsent/blender_val.json", "val[:95%]"),
}
TESTED = "counterfact/test_cf_first100.json"
#: Steps, of which the first two are not counted, and records tested.
STEPS, RECORDS = 6, 32


def train(lm: str, dtype: str, data: Path) -> dict[str, Any]:
    """Seconds a step of 16 edits, no row of which is known: the median."""
    import torch

    import instructedit.data.module as places
    import instructedit.training.module as training
    from instructedit.data.module import EditData, TaskSource
    from instructedit.editors.mend import InstructEdit

    place = getattr(places, "DataLocation", None) or places.Place
    module = training.EditingModule(InstructEdit(edit_rate=1e-4), training.LMConfig(name=lm, dtype=dtype))
    records = EditData(
        [TaskSource(task) for task in FILES], batch_size=16,
        places={task: place(str(data / file), part, part) for task, (file, part) in FILES.items()},
    )  # fmt: skip
    if hasattr(module, "connect"):
        module.connect(records)
    else:  # before 0.2 the two met in the Trainer
        module._trainer = records.trainer = argparse.Namespace(
            datamodule=records, lightning_module=module, precision="32-true", global_rank=0, world_size=1
        )
    records.setup("fit")
    editor = module.editor.train()
    loss = getattr(editor, "training_loss", None) or editor.objective
    weights = training.LossWeights(*(module.hparams[name] for name in ("c_edit", "c_loc", "c_unlikelihood")))
    optimizer = torch.optim.AdamW(editor.parameters(), lr=1e-6, fused=True)
    stream, seconds = iter(records.train_dataloader()), []
    for _ in range(STEPS):
        batch, start = next(stream), time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext():
            found = loss(batch, weights)["loss"]
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[2:]), "of": "a step"}


def score(lm: str, dtype: str, data: Path, words: bool) -> dict[str, Any]:
    """Seconds an edit and its probes, asked with an instruction and plainly; and the scores."""
    import torch

    from instructedit.editors import build_editor
    from instructedit.evaluation import Evaluation, evaluate
    from instructedit.lm import FrozenLM
    from instructedit.tasks import load_records

    model = FrozenLM.from_pretrained(lm, dtype=dtype)
    torch.manual_seed(0)
    editor = build_editor("instructedit", model, edit_rate=1e-4)
    records = load_records("counterfact", str(data / TESTED), "test")[0][:RECORDS]
    start = time.perf_counter()
    table = evaluate(model, editor, records, Evaluation(generate=words, fluency_tokens=0)).summary
    seconds = (time.perf_counter() - start) / RECORDS
    means = table.set_index("metric")["mean"]
    shown = {name: round(means[name], 1) for name in ("reliability", "generalization", "locality", "portability")}
    return {"seconds": seconds, "of": "an edit", "scores": shown}


def run(what: str, lm: str, dtype: str, data: Path) -> None:
    """One measurement in this process, printed as the last line, JSON."""
    warnings.filterwarnings("ignore")
    found = train(lm, dtype, data) if what == "train" else score(lm, dtype, data, what == "words")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(found | {"peak MB": peak}), flush=True)


def measured(what: str, source: Path, options: list[str]) -> dict[str, Any]:
    """The same of a copy of the code, in a process of its own."""
    command = [sys.executable, str(HERE), "--run", what, *options]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source}: {what} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(what: str, lm: str, dtype: str, data: Path, before: Path, repeats: int) -> None:
    """Both copies in turn; medians, their ratio, peaks and scores."""
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    for _ in range(repeats):
        for name, source, kind in (("before", before, "float32"), ("now", HERE.parents[2] / "src", dtype)):
            found = measured(what, source.resolve(), ["--lm", lm, "--dtype", kind, "--data", str(data)])
            runs[name].append(found)
            print(f"{what} {name} ({kind}): {found}", flush=True)
    took = {name: statistics.median(found["seconds"] for found in all_of) for name, all_of in runs.items()}
    peaks = {name: max(found["peak MB"] for found in all_of) for name, all_of in runs.items()}
    print(
        f"{what}: {took['before']:.2f} → {took['now']:.2f} s {runs['now'][0]['of']}, "
        f"{took['before'] / took['now']:.2f} ×; {peaks['before']} → {peaks['now']} MB\n",
        flush=True,
    )


def main() -> None:
    """Compares two copies, or, told so, measures this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", required=True, help="a folder, or a name that both copies know")
    parser.add_argument("--before", type=Path, help="the folder src of the other copy")
    parser.add_argument("--what", nargs="+", default=["train", "scores", "words"], help="train, scores, words")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of this code's LM (bfloat16: the hypernetwork's products too)"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the real records")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run, options.lm, options.dtype, options.data)
        return
    if options.before is None:
        parser.error("give --before: what to compare with")
    for what in options.what:
        compare(what, options.lm, options.dtype, options.data, options.before, options.repeats)


if __name__ == "__main__":
    main()
