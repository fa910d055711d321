"""Several methods on the same streams of edits: one table and one figure of what `instructedit edit --out` wrote.

    python experiments/many_edits/compare.py curves/*/* --out compared/

Each folder holds one sequence. Its parent's name is the method's, and its own name the stream's: `curves/FT-L/zsre`.
Writes ``compared.csv`` (every checkpoint) and ``compared.png``, and prints the last checkpoint of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

#: The metrics that are drawn, and the perplexity of plain text.
METRICS = ("reliability", "generalization", "locality")
_RATIO = "perplexity"


def sequence_of(folder: Path) -> Any:
    """What a folder of a sequence says of its edits so far, at each checkpoint.

    Returns:
        ``stream, method, edits, metric, mean, low, high, n``. The metric ``perplexity`` is that of plain text over the
        unedited model's, in percent.
    """
    import pandas as pd

    curves = pd.read_csv(folder / "curves.csv")
    own = curves[(curves["group"] == "all") & curves["metric"].isin(METRICS)]
    drifts = pd.read_csv(folder / "drifts.csv")
    ratio = 100 * drifts["perplexity_after"] / drifts["perplexity_before"]
    text = pd.DataFrame({"edits": drifts["edits"], "metric": _RATIO, "mean": ratio, "n": drifts["positions"]})
    found = pd.concat([own, text]).assign(stream=folder.name, method=folder.parent.name)
    return found[["stream", "method", "edits", "metric", "mean", "low", "high", "n"]]


def main() -> None:
    """Compares the sequences and writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of sequences: METHOD/STREAM")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and the figure")
    args = parser.parse_args()

    import pandas as pd

    wanted = [folder / name for folder in args.folders for name in ("curves.csv", "drifts.csv")]
    if missing := [file for file in wanted if not file.is_file()]:
        parser.error(f"{missing[0].parent}: no {missing[0].name}, which `instructedit edit --sequential --out` writes")
    compared = pd.concat([sequence_of(folder.resolve()) for folder in args.folders], ignore_index=True)
    args.out.mkdir(parents=True, exist_ok=True)
    compared.to_csv(args.out / "compared.csv", index=False, float_format="%.4g")
    draw(compared, args.out)
    last = compared[compared["edits"] == compared.groupby(["stream", "method"])["edits"].transform("max")]
    table = last.pivot_table(index=["stream", "method", "edits"], columns="metric", values="mean", sort=False)
    print(table.round(1).to_string())


def draw(compared: Any, out: Path) -> None:
    """Draws a row of panels for each stream, a panel for each metric, and a line for each method."""
    from matplotlib.figure import Figure

    from instructedit.analysis.curves import curve_lines
    from instructedit.analysis.style import caption, colours_of, legend, styled
    from instructedit.drawing import save_figure
    from instructedit.metrics import metric_title

    streams, methods = (list(dict.fromkeys(compared[key])) for key in ("stream", "method"))
    colours, metrics = colours_of(methods), [*METRICS, _RATIO]
    handles: dict[str, Any] = {}
    with styled():
        figure = Figure(figsize=(2.5 * len(metrics) + 0.6, 2.1 * len(streams) + 1.0), layout="constrained")
        grid = figure.subplots(len(streams), len(metrics), squeeze=False, sharex=True)
        for panels, stream in zip(grid, streams, strict=True):
            panels[0].set_ylabel(stream)
            for axes, metric in zip(panels, metrics, strict=True):
                own = compared[(compared["stream"] == stream) & (compared["metric"] == metric)]
                handles |= curve_lines(axes, own, "method", colours, methods)
                if metric == _RATIO:
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(-3, 103)
        for axes, title in zip(grid[0], [*map(metric_title, METRICS), "Perplexity"], strict=True):
            axes.set_title(title)
        for axes in grid[-1]:
            axes.set_xlabel("edits")
        legend(figure, handles)
        caption(
            figure,
            "All edits so far, asked again (a sample). Band: 95 % interval over records. "
            "Perplexity: of plain text, in % of the unedited model's.",
        )
    save_figure(figure, out / "compared")


if __name__ == "__main__":
    main()
