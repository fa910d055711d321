"""The notebooks run from the first cell to the last against a store that a very short experiment made."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pandas as pd
import pytest
import yaml

from instructedit.cli import main
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.paths import SHARED
from instructedit.tracking import load_table, runs

NOTEBOOKS = SHARED / "experiments" / "notebooks"
ROWS = ["InstructEdit", "MEND"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """Two editors of a small random LM, two steps each, tested on a few records: folder of the store, the LM's name."""
    root = tmp_path_factory.mktemp("notebooks")
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=256)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    tasks = [{"name": name, "size": 6} for name in ("counterfact", "recent", "convsent", "zsre")]
    short = {
        "model": {"lm": {"name": str(root / "lm")}, "evaluation": {"fluency_tokens": 8}},
        "data": {"test": tasks, "batch_size": 2, "val_size": 2},
        "trainer": {"max_steps": 2, "val_check_interval": 2, "enable_progress_bar": False},
    }
    (root / "short.yaml").write_text(yaml.safe_dump(short))
    overrides = [f"--config={root / 'short.yaml'}", "--model.editor.rank=4"]
    place = ["--root", str(root / "store"), "--out", str(root / "out")]
    main(["experiment", "demo", f"--rows={ROWS}", "--seeds=[0, 1]", f"--overrides={overrides}", *place])
    return root / "store", str(root / "lm")


def executed(name, store, monkeypatch):
    """The notebook after a run: every output of its cells, and its text."""
    monkeypatch.setenv("INSTRUCTEDIT_STORE", str(store[0]))
    monkeypatch.setenv("INSTRUCTEDIT_LM", store[1])
    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    return data, "\n".join(str(each.get("text/markdown", each.get("text/plain", ""))) for each in data)


def test_the_areas_are_drawn_again(store, monkeypatch):
    data, text = executed("areas.ipynb", store, monkeypatch)
    assert sum("image/png" in each for each in data) == 3  # the measures, the maps, the sizes
    for row in ROWS:
        assert f"demo/{row}/seed-1" in text
    assert "silhouette" in text
    ids = runs(root=store[0]).set_index("name")["run_id"]
    tables = [load_table(ids[f"demo/{ROWS[0]}/seed-{seed}"], "probes", store[0]) for seed in (0, 1)]
    shown = [table["cluster"].nunique() for table in tables]
    assert f"'{ROWS[0]}': {shown}" in text  # a record's edit is one point, a topic's cases are one


def test_the_table_is_made_again(store, monkeypatch):
    data, text = executed("tables.ipynb", store, monkeypatch)
    assert sum("image/png" in each for each in data) == 1
    assert "| CounterFact | Reliability |" in text
    assert "MEND" in text
    assert "corrected" in text
    summary = pd.read_csv(store[0].parent / "out" / "summary.csv").set_index(["method", "task", "metric"])
    printed = next(line for line in text.splitlines() if line.startswith("| CounterFact | Reliability |"))
    cells = [cell.strip(" *").removeprefix("<ins>").removesuffix("</ins>") for cell in printed.split("|")[3:-1]]
    means = [summary.loc[(row, "counterfact", "reliability"), "mean"] for row in ("MEND", "InstructEdit")]
    assert [cell.split()[0] for cell in cells] == [f"{mean:.1f}" for mean in means]


@pytest.mark.parametrize("name", sorted(file.name for file in NOTEBOOKS.glob("*.ipynb")))
def test_notebooks_are_kept_without_outputs(name):
    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_both_notebooks_are_there():
    assert {file.name for file in Path(NOTEBOOKS).glob("*.ipynb")} == {"areas.ipynb", "tables.ipynb"}
