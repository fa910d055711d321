"""How wide should ScopeEdit's scope be? Trained editors by their reach, scored on some records beside other editors.

    python experiments/scope_edit/reach.py --lm smollm2-135m --dtype bfloat16 --out reach/ --editors RUN --beside RUN

Several ``--editors`` are seeds of one training. Every question is asked plainly, and of an editor of ``--beside`` that
takes instructions also behind one; only teacher-forced scores are computed. The real records are read from ``data/``.
Writes ``reach.csv`` and ``reach.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

#: Task to its files by the kind of records: the source below the data folder, and the part of it.
RECORDS = {
    "validation": {"counterfact": ("counterfact", "train[95%:]"), "recent": ("recent", "train[95%:]")},
    "test": {"counterfact": ("counterfact", "test"), "recent": ("recent", "test"), "zsre": ("zsre", "test[:100]")},
}
METRICS = ("reliability", "generalization", "locality", "neighborhood", "portability")
REACHES = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def records_of(kind: str, data: Path) -> list[Any]:
    """The records of every task, each with two neighborhood probes where its split has them."""
    import instructedit as ie

    found = []
    for task, (source, part) in RECORDS[kind].items():
        whole, _ = ie.load_records(task, str(data / source), part.partition("[")[0])
        records, _ = ie.load_records(task, str(data / source), part)
        found += ie.with_neighbors(records, 2, whole)
    return found


def scored(lm: Any, editor: Any, records: list[Any], batch_size: int) -> dict[str, Any]:
    """Probe rows by the way of asking, which counts as the headline then."""
    import instructedit as ie

    table = ie.evaluate(lm, editor, records, ie.Evaluation(generate=False, fluency_tokens=0), batch_size, tqdm).table
    plain = table[table["view"] == "plain"].assign(main=True)
    return {"plain": plain} | ({"instructed": table} if (table["view"] == "instructed").any() else {})


def main() -> None:
    """Scores the editors and writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--editors", nargs="+", required=True, help="trained ScopeEdit editors: the seeds of one training"
    )
    parser.add_argument(
        "--beside", nargs="*", default=[], help="other trained editors, or names of methods without training"
    )
    parser.add_argument("--reaches", nargs="+", type=float, default=REACHES, help="values of the option reach")
    parser.add_argument("--records", choices=RECORDS, default="validation", help="which records to score")
    parser.add_argument("--lm", default="smollm2-135m", help="the model")
    parser.add_argument("--dtype", default="float32", help="data type of the model's weights")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the real records")
    parser.add_argument("--batch-size", type=int, default=16, help="records edited together")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and the figure")
    args = parser.parse_args()

    import pandas as pd

    import instructedit as ie
    from instructedit.analysis.summary import summarise
    from instructedit.editors import any_editor
    from instructedit.editors.options import adjust

    lm = ie.FrozenLM.from_pretrained(args.lm, dtype=args.dtype)
    records = records_of(args.records, args.data)
    parts = []
    for source in args.beside:
        editor = any_editor(source, lm)
        for view, table in scored(lm, editor, records, args.batch_size).items():
            parts.append(summarise(table, f"{type(editor).__name__}, {view}"))
    editors = [any_editor(source, lm) for source in args.editors]
    for reach in args.reaches:
        tables = []
        for seed, editor in enumerate(editors):
            adjust(editor, {"reach": reach})
            tables.append(scored(lm, editor, records, args.batch_size)["plain"].assign(seed=seed))
        parts.append(summarise(pd.concat(tables), f"{type(editor).__name__}, plain").assign(reach=reach))
    summary = pd.concat(parts)
    summary = summary[summary["metric"].isin(METRICS)]
    args.out.mkdir(parents=True, exist_ok=True)
    summary.to_csv(args.out / "reach.csv", index=False)
    draw(summary, args.out)
    summary = summary.assign(reach=["" if pd.isna(reach) else f"{reach:g}" for reach in summary["reach"]])
    table = summary.pivot_table(index=["task", "method", "reach"], columns="metric", values="mean", sort=False)
    print(table.round(1).to_string())


def draw(summary: Any, out: Path) -> None:
    """Draws Generalization over Neighborhood: a line of ScopeEdit's reaches, and a point for each other editor."""
    from matplotlib.figure import Figure

    from instructedit.drawing import save_figure
    from instructedit.tasks import task_title

    tasks = list(dict.fromkeys(summary["task"]))
    figure = Figure(figsize=(4 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = summary[summary["task"] == task].set_index(["method", "reach"])
        wide = {metric: rows["mean"] for metric, rows in own.groupby("metric")}
        for method in dict.fromkeys(own.index.get_level_values("method")):
            x, y = (wide[metric].loc[method] for metric in ("neighborhood", "generalization"))
            if x.index.isna().all():
                axes.plot(x, y, "o", label=method)
                continue
            (line,) = axes.plot(x, y, ".-", label=f"{method}, by reach")
            for reach in x.index:
                axes.annotate(f"{reach:g}", (x[reach], y[reach]), fontsize=7, color=line.get_color())
        axes.set(title=task_title(task), xlabel="Neighborhood", ylabel="Generalization")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save_figure(figure, out / "reach")


if __name__ == "__main__":
    main()
