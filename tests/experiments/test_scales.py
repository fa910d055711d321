"""Every row of the paper's experiments is built at the paper's scales: random models with as many blocks, few records.

Nothing is trained. The grids' own command lines are used; only the LM's folder is another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from instructedit import lightning_cli
from instructedit.callbacks import EditingAreaDump
from instructedit.cli import main
from instructedit.data.module import EditData, DataLocation, TaskSource
from instructedit.errors import UserError
from instructedit.experiments.experiment import Experiment
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.paths import SHARED
from instructedit.testbed.datasets import raw_records
from instructedit.tracking import load_table, runs
from instructedit.training.module import EditingModule

#: The experiments that reproduce the paper.
NAMES = ("demo", "table1", "table3", "figure3", "figure4a", "figure4bc", "figure4d", "table4", "table5", "cases")
#: Scale to the shape of its model.
SHAPES = {"gpt2-xl": ("gpt2", 48), "llama-2-7b": ("llama", 32)}
#: What the folders of the real data hold: no validation split of facts, ConvSent's training split left out.
SPLITS = {
    "counterfact": ("train", "test"),
    "recent": ("train", "test"),
    "convsent": ("val", "test"),
    "zsre": ("train", "test"),
}
RECORDS = 40
#: What tells rows apart but not what is built.
NOT_BUILT = ("--results.method=", "--model.evaluation.description=")

REAL = SHARED.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real datasets are not at {REAL}")

Built = tuple[EditingModule, EditData, Any]
All = dict[tuple[str, str, str], Built]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Path]:
    """A folder with the data and a narrow model for each scale; commands are run in it."""
    root = tmp_path_factory.mktemp("scales")
    for task, splits in SPLITS.items():
        for split in splits:
            file = root / "data" / task / f"{split}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(raw_records(task, "train" if split == "val" else split)[:RECORDS]))
    for scale, (architecture, blocks) in SHAPES.items():
        recipe = Recipe(architecture=architecture, width=16, layers=blocks, heads=2, vocab=600, context=128)  # type: ignore[arg-type]
        new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / scale)
        tokenizer.save_pretrained(root / scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


def build(place: Path, scale: str, arguments: list[str]) -> Built:
    options = [f"--model.lm.name={place / scale}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = lightning_cli.run([*arguments, *options], lightning_cli.Built)
    return cli.model, cli.datamodule, cli.trainer


@pytest.fixture(scope="module")
def built(place: Path) -> All:
    """Experiment, scale and row to what its command line makes, each distinct one once."""
    once: dict[tuple[str, ...], Built] = {}
    found = {}
    for scale in SHAPES:
        for name in NAMES:
            experiment = Experiment.load(name, scale)
            for row in experiment.grid.rows:
                arguments = experiment.arguments(row, 0)
                key = (scale, *(each for each in arguments[1:] if not each.startswith(NOT_BUILT)))
                if key not in once:
                    once[key] = build(place, scale, arguments)
                found[name, scale, row] = once[key]
    return found


def test_every_row_is_built_on_as_many_blocks(built: All) -> None:
    rows = {(name, row) for name, _, row in built}
    assert rows == {(name, row) for name in NAMES for row in Experiment.load(name).grid.rows}
    for (_, scale, _), (module, _, trainer) in built.items():
        architecture, blocks = SHAPES[scale]
        assert module.lm.model.config.model_type == architecture
        assert module.lm.model.config.num_hidden_layers == blocks
        assert str(module.lm.model.dtype) == "torch.bfloat16"
        assert trainer.accumulate_grad_batches == 2


def test_instructedit_and_mend_edit_the_last_three_blocks(built: All) -> None:
    for (_, scale, row), (module, _, _) in built.items():
        if row.partition(" (")[0] in ("InstructEdit", "MEND"):
            blocks = SHAPES[scale][1]
            touched = {int(part) for site in module.editor.sites for part in site.name.split(".") if part.isdigit()}
            assert touched == {blocks - 3, blocks - 2, blocks - 1}


@pytest.mark.parametrize("scale", SHAPES)
@pytest.mark.parametrize(
    ("row", "lr", "steps"),
    [("InstructEdit", 1e-6, 5000), ("MEND", 1e-6, 5000), ("KE", 1e-5, 10000), ("CaliNet (trained)", 5e-4, 15000)],
)
def test_the_papers_table_4(built: All, scale: str, row: str, lr: float, steps: int) -> None:
    module, data, trainer = built["table3", scale, row]
    assert (module.hparams["lr"], trainer.max_steps, trainer.accumulate_grad_batches) == (lr, steps, 2)
    assert (data.hparams["batch_size"], data.hparams["max_length"]) == (1, 96)  # appendix A: one edit, 96 tokens
    if lr == 1e-6:
        assert (module.hparams["c_edit"], module.hparams["c_loc"]) == (0.1, 1.0)


def test_every_row_reads_the_real_datas_folders(built: All) -> None:
    """Tasks, splits and numbers: 95 % of the training split to train on, the rest to validate on."""
    for data in {id(data): data for _, data, _ in built.values()}.values():
        for stage in ("fit", "test"):
            data.setup(stage)
        assert set(data.records["test"]) == set(SPLITS)
        for part, number in (("fit", RECORDS * 95 // 100), ("validate", RECORDS - RECORDS * 95 // 100)):
            for task, records in data.records[part].items():
                assert len({record.cluster for record in records}) == pytest.approx(number, abs=2), (part, task)
        assert {report.source.split("/")[0] for report in data.reports} == {"data"}
        cases = {record.cluster: 0 for record in data.records["test"]["convsent"]}
        assert len(data.records["test"]["convsent"]) == 10 * len(cases)  # appendix B: ten cases a topic


def test_rows_differ_in_what_they_train_on(built: All) -> None:
    def trained(name: str, row: str) -> dict[str, float]:
        _, data, _ = built[name, "gpt2-xl", row]
        assert data.hparams["mixing"] == "balanced"
        return {source.name: source.weight for source in data.sources["fit"]}

    three = {"counterfact": 1, "recent": 1, "convsent": 1}
    assert trained("table1", "MEND (Recent)") == {"recent": 1}
    assert trained("table1", "MEND (CounterFact)") == {"counterfact": 1}
    assert trained("table1", "MEND (ZsRE)") == {"zsre": 1}
    assert trained("figure4bc", "InstructEdit (Recent)") == {"recent": 1}
    assert trained("figure4bc", "InstructEdit (Recent, CounterFact)") == {"recent": 1, "counterfact": 1}
    assert trained("figure4bc", "InstructEdit") == trained("figure4d", "InstructEdit") == three
    assert trained("figure4d", "InstructEdit (unbalanced)") == {"counterfact": 1427, "recent": 570, "convsent": 14390}


def test_what_two_experiments_share_is_fitted_once() -> None:
    """A run is found again by its fingerprint: the same row in another experiment has the same one."""
    marks: dict[tuple[str, str], set[str]] = {}
    for name in NAMES:
        experiment = Experiment.load(name)
        for row, spec in experiment.grid.rows.items():
            if spec.of is None:
                marks.setdefault((row, "fit" if spec.fit else "test"), set()).add(experiment.fingerprint(row, 0))
    assert {row for (row, _), own in marks.items() if len(own) > 1} == set()
    assert len(set.union(*marks.values())) == len(marks)  # and another row another one


def test_figure_3_only_tests() -> None:
    experiment = Experiment.load("figure3")
    assert [row for row, spec in experiment.grid.rows.items() if spec.fitted] == ["InstructEdit"]
    assert len(experiment.rows) == 15
    config = yaml.safe_load((SHARED / "experiments/figure3/test.yaml").read_text())
    assert config["areas"] == {"records_per_task": 0}
    assert EditingAreaDump().records_per_task > 0


def test_a_task_lies_where_its_place_says_unless_its_source_does(place: Path) -> None:
    places: dict[str, DataLocation] = {
        "recent": DataLocation("./data/recent", train="test[:5]", val="test[5:7]"),
        "zsre": DataLocation("./data/nowhere"),
    }
    train = [TaskSource("recent"), TaskSource("counterfact", size=3), TaskSource("zsre", source="tiny", size=2)]
    data = EditData(train=train, places=places)
    data.setup("fit")
    assert [len(records) for records in data.records["fit"].values()] == [5, 3, 2]
    sources = {(report.task, report.split): report.source for report in data.reports}
    assert sources["recent", "test"] == "data/recent/test.json"
    assert (sources["counterfact", "train"], sources["zsre", "train"]) == ("tiny", "tiny")
    assert len(data.records["validate"]["recent"]) == 2
    with pytest.raises(UserError, match="data/nowhere: no such file or folder"):
        EditData(train=[TaskSource("zsre")], places=places).setup("fit")


@needs_real_data
def test_the_papers_rows_run_on_the_real_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As experiments/README.md says, over the embedded LM: a few steps, a few records of each task."""
    tasks = [{"name": name, "size": 4} for name in SPLITS]
    trainer = {"max_steps": 3, "val_check_interval": 3, "enable_progress_bar": False}
    short = {"data": {"test": tasks, "val_size": 2, "batch_size": 4}, "trainer": trainer}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short | {"model": {"evaluation": {"fluency_tokens": 8}}}))
    for task, splits in SPLITS.items():  # beside them lie other sets of the same names
        for split in splits:
            (tmp_path / "data" / task).mkdir(parents=True, exist_ok=True)
            for chosen in sorted((REAL / task).glob(f"*{split}*.json"), key=lambda file: len(file.name))[:1]:
                (tmp_path / "data" / task / chosen.name).symlink_to(chosen)
    monkeypatch.chdir(tmp_path)
    overrides = [f"--config={SHARED / 'configs/data/real.yaml'}", "--config=short.yaml"]
    main(["experiment", "table3", "--rows=[MEND, InstructEdit]", "--seeds=[0]", f"--overrides={overrides}"])
    summary = pd.read_csv("outputs/table3/summary.csv").set_index(["method", "task", "metric"])
    for method, task in product(("MEND", "InstructEdit"), SPLITS):
        assert 0 <= summary.loc[(method, task, "reliability"), "mean"] <= 100
        assert summary.loc[(method, task, "locality"), "n"] <= 4
    read = {task: file.read_text() for task in SPLITS for file in (REAL / task).glob("*test*")}
    table = load_table(runs().query("name == 'table3/MEND/seed-0'")["run_id"].iloc[0], "probes")
    for row in table[(table["kind"] == "reliability") & (table["task"] != "convsent")].itertuples():
        assert row.answer in read[row.task]
