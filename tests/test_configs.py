"""Configs: each file is explained and parsed, and a scale and an editor mean the same files in every command."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, product

import pytest
import yaml

from instructedit.cli import main
from instructedit.configs import Scale, expanded, located
from instructedit.errors import UserError
from instructedit.experiments import Experiment
from instructedit.paths import DEFAULTS, SHARED

GROUPS = ("lm", "editor", "data", "trainer")
OPTIONS = ("callbacks", "logger", "debug")
CONFIGS = {group: sorted((SHARED / "configs" / group).rglob("*.yaml")) for group in GROUPS}
#: Each editor's config beside one of every other group in turn; groups hardly ever set the same key.
MIXED = list(
    zip(cycle(CONFIGS["lm"]), CONFIGS["editor"], cycle(CONFIGS["data"]), cycle(CONFIGS["trainer"]), strict=False)
)
SCALES = sorted((SHARED / "configs" / "scale").glob("*.yaml"))
EVERY = sorted((SHARED / "configs").rglob("*.yaml"))
GRIDS = sorted(file.parent.name for file in (SHARED / "experiments").glob("*/grid.yaml"))
MEND = ("lm/smollm2-135m", "trainer/smollm2-135m", "data/multitask", "data/short-tests", "editor/tiny/mend")


def parsed(*args):
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", *args, "--print_config"])
    return yaml.safe_load(printed.getvalue())


def config(name: str) -> str:
    return f"--config={SHARED}/configs/{name}.yaml"


# -- the files -------------------------------------------------------------------------------------------------------


def test_every_config_is_in_one_of_the_groups():
    together = {file for group in CONFIGS.values() for file in group}
    named = {file for group in OPTIONS for file in (SHARED / "configs" / group).glob("*.yaml")}
    assert together | named | set(SCALES) | {DEFAULTS} == set(EVERY)
    assert {file for files in MIXED for file in files} == together


@pytest.mark.parametrize("files", MIXED, ids=lambda files: "+".join(file.stem for file in files))
def test_configs_compose(files):
    config = parsed(*(f"--config={file}" for file in files))
    lm, editor = (yaml.safe_load(file.read_text())["model"] for file in files[:2])
    assert config["model"]["lm"]["name"] == lm["lm"]["name"]
    assert config["model"]["editor"]["class_path"].endswith(f".{editor['editor']['class_path']}")
    assert config["model"]["editor"].get("init_args", {}).items() >= editor["editor"].get("init_args", {}).items()


@pytest.mark.parametrize("file", SCALES, ids=lambda file: file.stem)
def test_every_scale_has_every_editor_and_every_experiment(file):
    scale = Scale.load(file.stem)
    assert (scale.file, scale.name, scale.option) == (file, file.stem, file.stem)
    for editor in (path.stem for path in (SHARED / "configs" / "editor").glob("*.yaml")):
        assert all(path.is_file() for path in scale.files(editor))
        choices = [SHARED / "configs/editor" / folder / f"{editor}.yaml" for folder in (*scale.editors, "")]
        assert scale.editor(editor) == next(path for path in choices if path.is_file())
    for name in GRIDS:
        experiment = Experiment.load(name, file.stem)
        assert {row for pair in experiment.grid.compare for row in pair} <= set(experiment.rows)
        for row in experiment.rows:
            assert all(path.is_file() for path in experiment.configs(row))
    parsed(*experiment.arguments([*experiment.grid.rows][-1], 0)[1:])


@pytest.mark.parametrize("name", GRIDS)
def test_every_grids_last_row_is_parsed(name):
    experiment = Experiment.load(name)
    parsed(*experiment.arguments([*experiment.grid.rows][-1], 0)[1:])


def silent(text: str) -> Iterator[str]:
    """Keys without a comment beside or above them. Sections, whose values are keys on further lines, need none."""

    def keys(node: yaml.Node) -> Iterator[int]:
        for key, value in node.value:
            if not isinstance(value, yaml.MappingNode) or value.flow_style:
                yield key.start_mark.line
            else:
                yield from keys(value)

    lines = text.splitlines()
    for line in keys(yaml.compose(text)):
        if " # " not in lines[line] and not lines[line - 1].strip().startswith("# "):
            yield lines[line].strip()


@pytest.mark.parametrize("file", EVERY, ids=lambda file: file.relative_to(SHARED / "configs").as_posix())
def test_every_key_is_explained(file):
    assert file.read_text().startswith("# ")
    assert list(silent(file.read_text())) == []


def test_a_key_without_a_comment_is_noticed():
    text = "# Of all.\na:\n  b: 1  # one\n  # two\n  c: {d: 2}\n  e: [3]\n  f:\n    - 4\n"
    assert list(silent(text)) == ["e: [3]", "f:"]


# -- scale and editor by name ----------------------------------------------------------------------------------------


def test_a_scale_and_an_editor_are_the_long_form():
    assert parsed("--scale", "smollm2-135m", "--editor=mend") == parsed(*map(config, MEND))


def test_fit_and_experiment_find_the_same_files():
    for scale, (row, editor) in product(("tiny", "gpt2-xl", "llama-2-7b"), (("KE", "ke"), ("ROME", "rome"))):
        found = expanded(["test", f"--scale={scale}", f"--editor={editor}"])[1]
        assert found == Experiment.load("table3", scale).configs(row)


def test_configs_and_options_override_wherever_they_stand(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {lr: 0.5}\ntrainer: {max_steps: 7}\n")
    given = ["fit", f"--config={tmp_path}/own.yaml", "--trainer.max_steps=9", "--scale=tiny", "--editor=mend"]
    args, files = expanded(given)
    assert args == ["fit", *(f"--config={file}" for file in files), *given[1:3]]
    config = parsed(*given[1:])
    assert (config["model"]["lr"], config["trainer"]["max_steps"], config["data"]["replies"]) == (0.5, 9, 1)


def test_a_users_own_scale_and_editor(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "grace.yaml").write_text("model: {editor: {class_path: Grace}}")
    (tmp_path / "lm.yaml").write_text("model: {lm: {name: tiny, dtype: bfloat16}}")
    keys = "lm: lm.yaml\ntrainer: paper\ndata: [single-task]\neditors: [./mine, tiny]\n"
    (tmp_path / "own.yaml").write_text(keys)
    (tmp_path / "empty.yaml").write_text("model: {lr: 1}")
    monkeypatch.chdir(tmp_path)
    scale = Scale.load("own.yaml")
    shipped = SHARED / "configs"
    files = [tmp_path / "lm.yaml", shipped / "trainer/paper.yaml", shipped / "data/single-task.yaml"]
    for editor, its in (
        ("grace", tmp_path / "mine/grace.yaml"),
        ("rome", shipped / "editor/tiny/rome.yaml"),
        ("unedited", shipped / "editor/unedited.yaml"),
        ("mine/grace.yaml", tmp_path / "mine/grace.yaml"),
    ):
        assert scale.files(editor) == [*files, its]
    assert scale.lm_options() == {"name": "tiny", "dtype": "bfloat16"}
    assert scale.editor_options("rome")["blocks"] == [1]
    with pytest.raises(UserError, match=r"empty\.yaml: expected the keys model\.editor"):
        scale.editor_options("empty.yaml")
    assert (scale.editor_options("grace"), scale.paper, scale.option) == ({}, None, str(tmp_path / "own.yaml"))


NAMED = [(group, file.stem) for group in OPTIONS for file in sorted((SHARED / "configs" / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "name"), NAMED)
def test_callbacks_loggers_and_ways_to_debug_go_by_name(group, name):
    short, options = f"--{group}={name}", ("--scale=tiny", "--editor=mend")
    assert parsed(short, *options) == parsed(*options, config(f"{group}/{name}"))


def test_the_explained_defaults_are_the_defaults():
    options = ("--scale=tiny", "--editor=mend")
    plain, explained = parsed(*options), parsed(*options, "--callbacks=default", "--logger=mlflow")
    assert explained.pop("trainer")["logger"].items() >= plain.pop("trainer")["logger"].items()
    assert explained == plain


def test_every_command_reads_the_default_config_first(tmp_path):
    (tmp_path / "own.yaml").write_text("trainer: {max_steps: 7}\n")
    said = yaml.safe_load(DEFAULTS.read_text())["trainer"]
    for command in ("fit", "validate", "test", "predict"):
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit, match=r"^0$"):
            main([command, "--editor=unedited", f"--config={tmp_path}/own.yaml", "--print_config"])
        trainer = yaml.safe_load(printed.getvalue())["trainer"]
        assert trainer["logger"].pop("init_args")["root"] == "mlruns"  # complete: the logger's own defaults, too
        assert trainer.items() >= (said | {"max_steps": 7}).items()


def test_without_a_scale_the_plain_config_is_meant():
    assert expanded(["fit", "--editor=mend"])[1] == [SHARED / "configs/editor/mend.yaml"]
    assert expanded(["fit", "--model.lr=1"]) == (["fit", "--model.lr=1"], [])


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located(["-c", "configs/lm/tiny.yaml"]) == [config("lm/tiny")]
    (tmp_path / "configs/lm").mkdir(parents=True)
    (tmp_path / "configs/lm/tiny.yaml").write_text("{}")
    assert located(["--config", "configs/lm/tiny.yaml", "--a=1"]) == ["--config=configs/lm/tiny.yaml", "--a=1"]


WRONG = {
    "scale": (["--scale=tinny"], "unknown scale 'tinny' (did you mean 'tiny'?); there are: gemma-3-270m, gpt2-xl, "),
    "scale's file": (["--scale=no.yaml"], "scale no.yaml: no such file"),
    "editor": (["--scale=tiny", "--editor=mendd"], "unknown editor 'mendd' (did you mean 'mend'?); there are: alpha"),
    "editor alone": (["--editor=nosuch"], "unknown editor 'nosuch'; there are: alpha_edit, calinet, "),
    "way to debug": (["--debug=overfitt"], "unknown debug 'overfitt' (did you mean 'overfit'?); there are: anomaly, "),
    "no value": (["--scale"], "--scale: expected a name or a file"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "said"), WRONG.values(), ids=WRONG)
def test_what_is_not_there_is_one_line_with_what_is(capsys, args, said):
    assert main(["fit", *args]) == 2
    assert capsys.readouterr().err.startswith(f"instructedit: error: {said}")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("lm: tiny\ntrainer: tiny", "own.yaml: the following arguments are required: data"),
        ("lm: tiny\ntrainer: tiny\ndata: []\nsize: 3", "own.yaml: Option 'size'"),
        ("lm: tiny\ntrainer: tiny\ndata: []\nfile: x", "own.yaml: Option 'file'"),
        ("[tiny]", "own.yaml: expected keys and values"),
        ("lm: [", "own.yaml: not YAML"),
        ("lm: tinny\ntrainer: tiny\ndata: []", "own.yaml: unknown lm config 'tinny' (did you mean 'tiny'?)"),
        ("lm: tiny\ntrainer: tiny\ndata: [multitask, void]", "own.yaml: unknown data config 'void'; there are: "),
        ("lm: tiny\ntrainer: tiny\ndata: []\neditors: [gpt]", "own.yaml: editors: unknown folder 'gpt'"),
    ],
)
def test_a_wrong_scale_is_one_line(tmp_path, keys, said):
    (tmp_path / "own.yaml").write_text(keys)
    with pytest.raises(UserError) as error:
        Scale.load(tmp_path / "own.yaml").files("mend")
    assert said in str(error.value)
    assert "\n" not in str(error.value).strip() or "not YAML" in said


# -- an installed package ----------------------------------------------------------------------------------------------


def test_a_built_package_brings_its_configs_and_experiments(tmp_path):
    target = tmp_path / "site"
    build = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={target}"]
    subprocess.run(build, cwd=SHARED, check=True, capture_output=True)
    code = (
        "from instructedit.experiments import Experiment\n"
        "for name in ('demo', 'table3', 'robustness'):\n"
        "    experiment = Experiment.load(name, 'gpt2-xl')\n"
        "    print(*(path for row in experiment.grid.rows for path in experiment.configs(row)), sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = target / "instructedit" / "_shared"
    here = [
        home / path.relative_to(SHARED)
        for experiment in (Experiment.load(name, "gpt2-xl") for name in ("demo", "table3", "robustness"))
        for row in experiment.grid.rows
        for path in experiment.configs(row)
    ]
    assert done.stdout.splitlines() == list(map(str, here))
    brought = {file.relative_to(home) for file in home.rglob("*") if file.is_file()}
    own = [*EVERY, *SHARED.glob("experiments/*/*.yaml"), *SHARED.glob("experiments/*/paper.csv")]
    assert brought == {file.relative_to(SHARED) for file in own}
