"""Report of the benchmark: a table, a figure, and everything as JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from instructedit.benchmark.bench import Setting
from instructedit.console import console
from instructedit.provenance import provenance


def report(rows: list[dict[str, Any]], many: list[dict[str, float]], setting: Setting, file: str | None) -> None:
    """Prints the table; writes everything as JSON, and next to it the figure of many edits."""
    console().print(_table(rows))
    for each in many:
        console().print(
            f"{each['edits']:>6} edits: {each['ms_per_edit']:.1f} ms an edit, peak {each['memory_mb']:.0f} MB"
        )
    if not file:
        return
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": {**provenance(), "processor": platform.processor()}, "setting": asdict(setting)}
    path.write_text(json.dumps({**facts, "rows": rows, "many_edits": many}, indent=1) + "\n")
    if many:
        from instructedit.analysis import many_edits_figure
        from instructedit.drawing import save_figure

        save_figure(many_edits_figure(many), path.with_suffix(""))


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(
        "shape", "measure", "variant", "rate", "× plain", "GFLOP", "GB", "share of floor", "peak MB", "÷ plain's"
    )
    table.caption = "peak MB: above the LM, the editor and Adam"
    plain = {(r["shape"], r["measure"]): r for r in rows if r["variant"] == "plain"}
    for row in rows:
        base = plain[row["shape"], row["measure"]]
        table.add_row(
            row["shape"], row["measure"], row["variant"], f"{row['rate']:.2f} {row['unit']}", f"{row['ratio']:.2f}",
            f"{row['gflop']:.0f}", f"{row['gbyte']:.1f}", f"{100 * row['floor_share']:.0f} %",
            f"{row['memory_mb']:.0f}", f"{row['memory_mb'] / base['memory_mb']:.2f}",
        )  # fmt: skip
    return table
