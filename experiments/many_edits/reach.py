r"""How wide should ScopeEdit's scope be among many edits? Each stream is edited once, and asked with several reaches.

    python experiments/many_edits/reach.py --lm smollm2-135m --dtype bfloat16 --editor RUN --out reach/ \
      --streams validation/*.json

A stream is a file of requests (see `instructedit edit --requests`). All of them are edited with, then a sample is asked
again with each reach; that the edits do not depend on it is what makes one pass enough. Writes ``reach.csv``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS = ("reliability", "generalization", "locality")


def asked(lm: Any, editor: Any, stream: Path, reaches: list[float], sample: int, batch_size: int) -> list[Any]:
    """Makes the edits of a stream and summarises what a sample says with each reach."""
    import pandas as pd

    import instructedit as ie
    from instructedit.analysis.summary import summarise
    from instructedit.edits import add
    from instructedit.evaluation.runner import ask_all
    from instructedit.instructions import render_records
    from instructedit.reports import read_cases
    from instructedit.reports.sequences import case_records

    settings = ie.Evaluation(generate=False, fluency_tokens=0)
    rendered = render_records(case_records(lm, read_cases(stream)), None)
    carried = None
    for start in tqdm(range(0, len(rendered), batch_size), desc=f"{stream.stem}: edits"):
        made, _ = editor.make_next(editor.rendered_requests(rendered[start : start + batch_size]), {})
        carried = add(carried, made.detach())
    few = rendered[:: max(1, len(rendered) // sample)][:sample]
    found = []
    for reach in tqdm(reaches, desc=f"{stream.stem}: reaches"):
        gate = carried.gate._replace(bias=carried.gate.bias + (reach - editor.reach))
        table = pd.DataFrame(ask_all(lm, replace(carried, gate=gate), few, settings))
        summary = summarise(table, "ScopeEdit").assign(stream=stream.stem, edits=len(rendered), reach=reach)
        found.append(summary[summary["metric"].isin(METRICS)])
    return found


def main() -> None:
    """Asks with every reach and writes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editor", required=True, help="a trained ScopeEdit")
    parser.add_argument("--streams", nargs="+", type=Path, required=True, help="files of requests")
    parser.add_argument(
        "--reaches", nargs="+", type=float, default=[0, 0.5, 1, 1.5, 2], help="values of the option reach"
    )
    parser.add_argument("--sample", type=int, default=200, help="records that are asked again")
    parser.add_argument("--batch-size", type=int, default=10, help="records edited together")
    parser.add_argument("--lm", default="smollm2-135m", help="the model")
    parser.add_argument("--dtype", default="float32", help="data type of the model's weights")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table")
    args = parser.parse_args()

    import pandas as pd

    import instructedit as ie
    from instructedit.editors import any_editor

    lm = ie.FrozenLM.from_pretrained(args.lm, dtype=args.dtype)
    editor = any_editor(args.editor, lm).eval()
    parts = [
        part
        for stream in args.streams
        for part in asked(lm, editor, stream, args.reaches, args.sample, args.batch_size)
    ]
    summary = pd.concat(parts)
    args.out.mkdir(parents=True, exist_ok=True)
    columns = ["stream", "edits", "reach", "metric", "mean", "low", "high", "n"]
    summary[columns].to_csv(args.out / "reach.csv", index=False, float_format="%.4g")
    print(
        summary.pivot_table(index=["stream", "reach"], columns="metric", values="mean", sort=False).round(1).to_string()
    )


if __name__ == "__main__":
    main()
