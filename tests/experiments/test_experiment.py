"""Experiments: what a grid may say, which files a row gets, what is run again and what is not, and the report."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from tests.experiments.helpers import GRID, PAPER, SCALE, changed, parents, run, watched, write

from instructedit import paths
from instructedit.analysis import EditingAreas
from instructedit.callbacks import EditingAreaDump
from instructedit.configs import Scale
from instructedit.editors import load_editor
from instructedit.errors import UserError
from instructedit.experiments import Experiment, Grid
from instructedit.experiments import fingerprint as fingerprints
from instructedit.experiments.fingerprint import fingerprint
from instructedit.experiments.sections import Panel, Section
from instructedit.experiments.sections.metrics import MetricsSection
from instructedit.lm import FrozenLM
from instructedit.tracking import artifact_path, runs

TABLE3 = paths.SHARED / "experiments" / "table3"

# -- grids ---------------------------------------------------------------------------------------------------------


WRONG = {
    "unknown key": (["layuot"], "tall", "grid.yaml: Option 'layuot'"),
    "missing key": (["title"], None, "grid.yaml: the following arguments are required: title"),
    "layout": (["layout"], "long", "grid.yaml: Parser key \"layout\": Expected a typing.Literal['wide', 'tall']"),
    "seeds": (["seeds"], "none", 'grid.yaml: Parser key "seeds"'),
    "unknown key of a row": (["rows", "MEND", "fitt"], True, "grid.yaml: rows: MEND: Option 'fitt'"),
    "row without an editor": (["rows", "MEND"], {"fit": False}, "rows: MEND: expected one of the keys editor and of"),
    "row with both": (["rows", "MEND", "of"], "MEND", "rows: MEND: expected one of the keys editor and of"),
    "test of no row": (["rows", "raw"], {"of": "KE"}, "grid.yaml: rows: raw: of: no row 'KE'; there are: unedited, "),
    "test of what is not fitted": (["rows", "raw"], {"of": "unedited"}, "rows: raw: of: row 'unedited' is not fitted"),
    "no config of all": (["configs"], ["absent.yaml"], "row 'unedited': configs: "),
    "no config of a row": (["rows", "MEND", "configs"], ["absent.yaml"], "row 'MEND': configs: "),
    "unknown section": (
        ["sections"],
        ["table", "tabel"],
        "grid.yaml: sections: no section 'tabel'; there are: areas, ",
    ),
    "options of no section": (["options"], {"tabel": {}}, "grid.yaml: options: no section 'tabel'"),
    "unknown key of the search": (
        ["search"],
        {"base": "MEND", "parameters": {"--a": [1]}, "tries": 1},
        "grid.yaml: search: Option 'tries'",
    ),
    "search without a row": (["search"], {"base": "KE", "parameters": {"--a": [1]}}, "search: base: no row 'KE'"),
    "search of what is not fitted": (
        ["search"],
        {"base": "unedited", "parameters": {"--a": [1]}},
        "search: base: row 'unedited' is not fitted",
    ),
    "search for nothing": (["search"], {"base": "MEND", "parameters": {}}, "search: parameters: nothing to try"),
    "search among nothing": (["search"], {"base": "MEND", "parameters": {"--a": []}}, "search: parameters: --a: no va"),
    "no option": (["search"], {"base": "MEND", "parameters": {"lr": [1]}}, "an option such as --model.lr, got 'lr'"),
    "unknown sampler": (
        ["search"],
        {"base": "MEND", "parameters": {"--a": [1]}, "sampler": "best"},
        "grid.yaml: search: Parser key",
    ),
    "no trials": (["search"], {"base": "MEND", "parameters": {"--a": [1]}, "trials": 0}, "search: trials: expected at"),
    "a row that is a name": (["rows", "MEND"], "mend", "grid.yaml: rows: MEND: expected keys and values, got 'mend'"),
    "scales of its own": (["scales"], {"one": {}}, "grid.yaml: scales: a scale is a file now, configs/scale/NAME.yaml"),
    "compared with nothing": (["compare"], [["MEND", "KE"]], "grid.yaml: compare: no row 'KE'; there are: unedited, "),
    "no file of figures": (["paper"], "absent.csv", "absent.csv: no such file"),
    "unknown model": (["paper_model"], "Bog", "paper.csv: no model 'Bog'; there are: Big, Other"),
    "no such config": (
        ["rows", "MEND", "editor"],
        "ke",
        "row 'MEND': unknown editor 'ke'; there are: ft_l, mend, unedited",
    ),
}


@pytest.mark.parametrize(("path", "value", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_grid_is_one_line_with_file_and_key(copy, path, value, said):
    write(copy / "experiments/try/grid.yaml", changed(path, value))
    with pytest.raises(UserError) as error:
        Experiment.load("try", "one")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_of_published_figures_is_missing(copy):
    write(copy / "experiments/try/paper.csv", PAPER.replace("mean", "value"))
    with pytest.raises(UserError, match=r"paper\.csv: no column 'mean'"):
        Experiment.load("try", "one")


@pytest.mark.parametrize(
    ("editors", "chosen"),
    [
        (["small"], "small/mend.yaml"),
        (["one", "small"], "one/mend.yaml"),
        (["new"], "mend.yaml"),
        ([], "mend.yaml"),
    ],
)
def test_the_first_folder_with_the_editor_is_taken(copy, editors, chosen):
    write(copy / "configs/editor/one/mend.yaml", "")
    write(copy / "configs/editor/new/ft_l.yaml", "")
    write(copy / "configs/scale/one.yaml", SCALE | {"editors": editors})
    names = ("lm/one.yaml", "trainer/short.yaml", "all.yaml", f"editor/{chosen}")
    assert Experiment.load("try", "one").configs("MEND") == [copy / "configs" / name for name in names]


def test_a_scale_may_be_a_users_own_file(copy, tmp_path_factory):
    own = tmp_path_factory.mktemp("own") / "mine.yaml"
    write(own, SCALE | {"lm": "lm.yaml", "data": [str(copy / "configs/all.yaml")], "editors": []})
    write(own.parent / "lm.yaml", "model: {}")
    experiment = Experiment.load("try", str(own))
    assert experiment.configs("MEND")[0] == own.parent / "lm.yaml"
    assert experiment.out.as_posix() == "outputs/try-mine"
    assert f"--scale {own} " in experiment.command


def test_only_the_scales_model_is_quoted_unless_the_grid_names_another(copy):
    published = Experiment.load("try", "one").published
    assert published.to_dict("records") == [{"method": "MEND", "task": "zsre", "metric": "reliability", "mean": 81.25}]
    write(copy / "experiments/try/grid.yaml", changed(["paper_model"], "Other"))
    assert Experiment.load("try", "one").published["mean"].tolist() == [12.5]
    write(copy / "experiments/try/grid.yaml", changed(["paper"], None))
    assert Experiment.load("try", "one").published is None
    write(copy / "experiments/try/grid.yaml", {k: v for k, v in GRID.items() if k != "paper"} | {"paper_model": "Big"})
    with pytest.raises(UserError, match="paper_model: needs the key paper"):
        Experiment.load("try", "one")


# -- the paper's Table 3 --------------------------------------------------------------------------------------------


def test_the_papers_table_is_there():
    table = pd.read_csv(TABLE3 / "paper.csv")
    assert table.groupby(["model", "task"]).size().to_dict() == {
        **{("GPT2-XL", task): 28 for task in ("counterfact", "recent", "zsre")},
        **{("LLaMA-2", task): 28 for task in ("counterfact", "recent", "zsre")},
        ("GPT2-XL", "convsent"): 21,
    }
    cells = table.set_index(["model", "method", "task", "metric"])["mean"]
    assert cells.index.is_unique
    assert cells["GPT2-XL", "GRACE", "counterfact", "reliability"] == 96.31
    assert cells["GPT2-XL", "MEND", "counterfact", "portability"] == 41.88
    assert cells["LLaMA-2", "KE", "counterfact", "locality"] == 90.86
    assert cells["LLaMA-2", "InstructEdit", "recent", "generalization"] == 55.92
    assert cells["GPT2-XL", "unedited", "convsent", "fluency"] == 613.13
    assert cells["GPT2-XL", "CaliNet", "convsent", "fluency"] == 396.43
    assert cells["GPT2-XL", "InstructEdit", "zsre", "reliability"] == 82.83
    assert cells["LLaMA-2", "FT-L", "zsre", "locality"] == 98.89
    assert cells["LLaMA-2", "InstructEdit", "zsre", "portability"] == 58.19


def test_every_published_method_has_a_row():
    table3 = Grid.load(TABLE3 / "grid.yaml")
    assert set(pd.read_csv(TABLE3 / "paper.csv")["method"]) <= set(table3.rows)
    scales = [Scale.load(file.stem) for file in (paths.SHARED / "configs/scale").glob("*.yaml")]
    assert {scale.paper for scale in scales} == set(pd.read_csv(TABLE3 / "paper.csv")["model"])


# -- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_what_a_run_is_made_from(copy, tmp_path_factory):
    def mark(name="MEND", seed=3, **options):
        return fingerprint(Experiment.load("try", "one", **options).arguments(name, seed))

    first = mark()
    assert mark(root="elsewhere", out="elsewhere", seeds=[3], rows=["MEND"]) == first
    others = [mark(seed=4), mark("FT-L (raw)"), mark(overrides=["--model.lr=1"])]
    for file in ("configs/all.yaml", "configs/editor/small/mend.yaml"):
        text = (copy / file).read_text()
        write(copy / file, text + "# more\n")
        others.append(mark())
        write(copy / file, text)
    assert len({first, *others}) == 6
    assert mark() == first


def test_a_fingerprint_is_not_of_where_a_config_lies(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "x.yaml", "data: {}\n")
    write(tmp_path / "b" / "y.yaml", "data: {}\n# more\n")
    of = [fingerprint(["fit", f"--config={tmp_path}/{name}"]) for name in ("a/x.yaml", "b/x.yaml", "b/y.yaml")]
    assert of[0] == of[1] != of[2]


def test_a_fingerprint_is_of_the_package(monkeypatch, tmp_path):
    marks = []
    written = ("one.py", "1"), ("one.py", "2"), ("two.py", "2"), ("data/table.csv", ""), ("analysis/areas.py", "3")
    for name, text in (*written, ("analysis/tables.py", "4")):
        write(tmp_path / name, text)
        monkeypatch.setattr(fingerprints, "SOURCE", tmp_path)
        fingerprints._package.cache_clear()
        marks.append(fingerprint(["fit"]))
    fingerprints._package.cache_clear()
    assert len(set(marks)) == len(written)
    assert marks[-1] == marks[-2]  # tables show what is stored, and areas are stored


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The store and the results of an experiment that ran from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "SHARED", made)
        status, printed, _ = run(folder / "store", folder / "out")
    assert status == 0
    return SimpleNamespace(
        store=folder / "store", out=folder / "out", printed=printed, runs=runs(root=folder / "store")
    )


def test_the_report(whole):
    for i, name in enumerate(GRID["rows"], 1):
        assert f"row {i} of 3: {name}" in whole.printed
    table = (whole.out / "table.md").read_text()
    assert "paper: published figures for Big.\n\n| CounterFact | Reliability |" in table
    assert "| ZsRE (held out) | Reliability | paper | Generalization | Locality | Portability |" in table
    (line,) = [line for line in table.split("| ZsRE")[1].splitlines() if line.startswith("| MEND |")]
    assert line.split(" | ")[2] == "81.2"
    assert "ZsRE (held out)" in whole.printed
    differences = whole.printed.split("MEND − FT-L (raw)  (*: p (Holm) < 0.05)")[1].splitlines()
    assert differences[2].split() == ["Reliability", "Generalization", "Locality", "Portability"]
    (row,) = [line for line in differences if line.startswith(" ZsRE (held out)")]
    assert row.count("[") == 4
    names = {"table.md", "summary.csv", "differences.csv", "metrics.png", "areas.png"}
    assert names <= {path.name for path in whole.out.iterdir()}
    assert list(dict.fromkeys(pd.read_csv(whole.out / "summary.csv")["method"])) == list(GRID["rows"])


def test_what_is_done_is_not_done_again(place, whole, monkeypatch, tmp_path):
    before = len(runs(root=whole.store))
    done = watched(monkeypatch)
    status, printed, _ = run(whole.store, tmp_path / "out")
    assert (status, done) == (0, [])
    assert printed.count("of the store is used again") == 4
    for name in ("summary.csv", "differences.csv", "table.md", "metrics.png", "areas.png"):
        assert (tmp_path / "out" / name).read_bytes() == (whole.out / name).read_bytes(), name
    assert len(runs(root=whole.store)) == before + 1
    children = whole.runs.set_index("name")["run_id"]
    parent = parents(whole.store)[0]
    assert parent.info.run_id not in set(whole.runs["run_id"])
    assert {key: value for key, value in parent.data.tags.items() if key.startswith("reused.")} == {
        "reused.unedited/3": children["try/unedited/seed-3"],
        "reused.FT-L _raw_/3": children["try/FT-L (raw)/seed-3"],
        "reused.MEND/3": children["try/MEND/seed-3"],
        "reused.MEND/4": children["try/MEND/seed-4"],
    }
    assert artifact_path(parent.info.run_id, "figures/areas.png", whole.store).is_file()


def test_only_what_has_changed_is_done_again(copy, whole, monkeypatch, tmp_path):
    store = whole.store
    done = watched(monkeypatch)
    file = copy / "configs/editor/unedited.yaml"
    write(file, file.read_text() + "# another\n")
    assert run(store, tmp_path / "out", "--seeds=[4]", "--rows=[unedited, MEND]")[0] == 0
    assert done == [("unedited", 4)]
    assert run(store, tmp_path / "out", "--seeds=[4]", "--rows=[unedited]", "--force=true")[0] == 0
    assert done == [("unedited", 4)] * 2


def test_a_run_whose_tables_are_gone_is_done_again(place, whole, monkeypatch, tmp_path):
    store = whole.store
    run_id = whole.runs.set_index("name").loc["try/unedited/seed-3", "run_id"]
    artifact_path(run_id, "tables/probes.parquet", store).unlink()
    done = watched(monkeypatch)
    status, printed, _ = run(store, tmp_path / "out", "--rows=[unedited, MEND]")
    assert (status, done) == (0, [("unedited", 3)])
    assert f"run {run_id}: no artifact" in printed


def test_a_run_killed_before_its_areas_were_written_is_done_again(place, whole, monkeypatch, tmp_path):
    def killed(*args):
        raise KeyboardInterrupt

    store, only = whole.store, ["--rows=[MEND]", "--seeds=[5]"]
    with monkeypatch.context() as patch:
        patch.setattr(EditingAreaDump, "on_test_epoch_end", killed)
        with pytest.raises(SystemExit):
            run(store, tmp_path / "out", *only)
    run_id = runs(root=store).set_index("name").loc["try/MEND/seed-5", "run_id"]
    assert artifact_path(run_id, "tables/probes.parquet", store).is_file()
    MlflowClient(f"sqlite:///{store}/mlflow.db").update_run(run_id, "FINISHED")  # as its fit left it: SIGKILL
    done = watched(monkeypatch)
    assert run(store, tmp_path / "out", *only)[0] == 0
    assert run(store, tmp_path / "out", *only)[0] == 0
    assert done == [("MEND", 5)]


@pytest.mark.parametrize(
    ("error", "said"), [(UserError("no such thing"), ""), (RuntimeError("out of memory"), "Traceback")]
)
def test_a_row_that_fails_does_not_take_the_others_along(place, whole, monkeypatch, tmp_path, error, said):
    done = watched(monkeypatch, "FT-L (raw)", error)
    status, _, errors = run(whole.store, tmp_path / "out", "--rows=['FT-L (raw)', unedited]", "--force=true")
    assert (status, done) == (2, [("unedited", 3)])
    assert f"row 'FT-L (raw)': {error}" in errors
    assert ("Traceback" in errors) == bool(said)
    assert errors.splitlines()[-1].endswith("1 of 2 rows failed, see above: FT-L (raw)")
    table = (tmp_path / "out/table.md").read_text()
    assert "| unedited |" in table
    assert "MEND" not in table
    assert parents(whole.store)[0].info.status == "FAILED"


def test_all_rows_fail(place, whole, monkeypatch, tmp_path):
    watched(monkeypatch, "unedited", UserError("no such thing"))
    status, _, errors = run(whole.store, tmp_path / "out", "--rows=[unedited]", "--force=true")
    assert status == 2
    assert [line for line in errors.splitlines() if line.startswith("instructedit: ")] == [
        "instructedit: error: row 'unedited': no such thing",
        "instructedit: error: 1 of 1 rows failed, see above: unedited",
    ]
    assert not (tmp_path / "out").exists()


def test_a_section_that_fails_does_not_take_the_others_along(place, whole, monkeypatch, tmp_path):
    def broken(self, results):
        yield Panel("first", "First", frame=pd.DataFrame({"a": [1]}))
        raise RuntimeError("no such colour")

    monkeypatch.setattr(MetricsSection, "show", broken)
    status, _, errors = run(whole.store, tmp_path / "out", "--rows=[unedited, MEND]", "--seeds=[3]")
    assert status == 2
    assert "instructedit: error: section 'metrics': no such colour" in errors
    assert errors.splitlines()[-1].endswith("1 of 6 sections failed, see above: metrics")
    page = (tmp_path / "out/index.html").read_text()
    assert "1 of 6 sections failed, see above: metrics" in page
    assert {"table.md", "first.csv", "areas.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert parents(whole.store)[0].info.status == "FAILED"


def test_what_a_run_leaves_in_the_store(whole):
    client = MlflowClient(f"sqlite:///{whole.store}/mlflow.db")
    run_id = whole.runs.set_index("name").loc["try/MEND/seed-4", "run_id"]
    data = client.get_run(run_id).data
    tags = {"experiment": "try", "method": "MEND", "scale": "one", "seed": "4", "tasks.fit": "counterfact"}
    assert {**tags, "tasks.test": "counterfact,zsre"}.items() <= data.tags.items()
    summary = pd.read_parquet(artifact_path(run_id, "tables/summary.parquet", whole.store))
    for row in summary.itertuples():
        assert data.metrics[f"test/{row.task}/{row.metric}"] == pytest.approx(row.mean)
    areas = EditingAreas.load(artifact_path(run_id, "areas/areas.safetensors", whole.store))
    site = areas.site_names[0]
    own = [float(n) for n, task in zip(areas.norms[site], areas.tasks, strict=True) if task == "CounterFact"]
    assert data.metrics[f"update_norm.CounterFact/{site}"] == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_the_trained_editor_is_an_artifact(whole, made):
    lm = FrozenLM.from_pretrained(str(made / "lm"))
    run_id = whole.runs.set_index("name").loc["try/MEND/seed-4", "run_id"]
    editor = load_editor(artifact_path(run_id, "editor", whole.store), lm)
    client = MlflowClient(f"sqlite:///{whole.store}/mlflow.db")
    checkpoint = whole.store / client.get_run(run_id).data.tags["checkpoint"]
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert saved
    for name, value in editor.state_dict().items():
        assert torch.equal(value, saved[f"editor.{name}"]), name


def test_a_test_metric_is_at_one_step(whole):
    client = MlflowClient(f"sqlite:///{whole.store}/mlflow.db")
    run_id = whole.runs.set_index("name").loc["try/MEND/seed-4", "run_id"]
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith("test/")]
    steps = {point.step for name in names for point in client.get_metric_history(run_id, name)}
    (step,) = steps
    assert step > 0  # that it was trained to


def test_the_experiments_run_links_its_page(whole):
    parent = parents(whole.store)[-1]
    assert (
        artifact_path(parent.info.run_id, "index.html", whole.store).read_text()
        == (whole.out / "index.html").read_text()
    )
    note = parent.data.tags["mlflow.note.content"]
    place = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts/index.html"
    assert note.startswith(f"[results page]({place})")
    assert "| ZsRE (held out) | Reliability | paper |" in note


def test_the_old_key_and_names_of_sections_are_read_for_now(copy):
    write(copy / "experiments/try/grid.yaml", changed(["views"], ["table", "areas"]))
    with pytest.warns(UserWarning, match=r"grid\.yaml: views: this key is called sections now"):
        grid = Grid.load(copy / "experiments/try/grid.yaml")
    assert grid.sections == ("table", "areas")
    with pytest.warns(DeprecationWarning, match="import Section"):
        from instructedit.experiments.views import Shown, View
    assert (Shown, View) == (Panel, Section)
