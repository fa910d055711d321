r"""How fast do editors train, on records that are new and on records that come again? Their steps are timed in turn.

    python experiments/scope_edit/rate.py --editors instructedit scope_edit --passes 3 --out rate/ \
      --scale smollm2-135m --config configs/data/real.yaml --config experiments/scope_edit/rate.yaml

Other options are those of `instructedit fit`. A step computes the loss of a batch and its gradient, and lets Adam
move the editor; the prefix cache is in memory and empty at first. Writes ``rate.csv``, a row for each step, and prints
medians by pass with the rates of all editors over the first one's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Training:
    """An editor that is trained a step at a time.

    Args:
        editor: Name of its config.
        options: Options of `instructedit fit`.
    """

    def __init__(self, editor: str, options: list[str]) -> None:
        from instructedit.lightning_cli import Built, run

        cli = run(["fit", "--editor", editor, *options, "--trainer.logger=false"], Built)
        cli.model.trainer = cli.trainer
        cli.datamodule.setup("fit")
        self.editor, self.weights = cli.model.editor.train(), cli.model.loss_weights
        self.editor.start_at(1e-4)
        self.optimizer = cli.model.configure_optimizers()["optimizer"]
        self.batches: Iterator[Any] = iter(cli.datamodule.train_dataloader())
        sizes = [len(records) for records in cli.datamodule.records["fit"].values()]
        self.steps_in_pass = sum(sizes) // cli.datamodule.hparams["batch_size"]

    def step(self) -> float:
        """Trains on the next batch; returns how many seconds it took."""
        batch = next(self.batches)
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.editor.training_loss(batch, self.weights)["loss"].backward()
        self.optimizer.step()
        return time.perf_counter() - began


def main() -> None:
    """Times the editors and writes and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editors", nargs="+", required=True, help="names of the editors' configs")
    parser.add_argument("--passes", type=int, default=3, help="passes over the training records")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table")
    args, options = parser.parse_known_args()

    import pandas as pd

    trainings = {name: Training(name, options) for name in args.editors}
    rows = []
    for number in range(1, args.passes + 1):
        steps = next(iter(trainings.values())).steps_in_pass
        for step in tqdm(range(steps), desc=f"pass {number}", unit="step"):
            for name, training in trainings.items():
                rows.append({"editor": name, "pass": number, "step": step, "seconds": training.step()})
    table = pd.DataFrame(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "rate.csv", index=False, float_format="%.3f")
    medians = table.pivot_table(index="pass", columns="editor", values="seconds", aggfunc="median", sort=False)
    first = medians[args.editors[0]]
    for name in args.editors[1:]:
        medians[f"{name}, × rate"] = first / medians[name]
    print(medians.round(2).to_string())


if __name__ == "__main__":
    main()
