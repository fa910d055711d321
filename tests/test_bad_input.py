"""Whatever is wrong with what the user gave: a status, one line that says what and where, and no finished run."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch

import instructedit as ie
from instructedit.cli import DEBUG, main
from instructedit.errors import UserError
from instructedit.lightning_cli import run
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.tracking import recent_runs

RECORD = {
    "prompt": "The capital of Peru is",
    "target_new": "Lyon",
    "rephrase": "Peru has the capital",
    "portability": {"Reasoning": [{"prompt": "The mayor of Peru's capital sits in", "ground_truth": "Lyon"}]},
    "locality": {"Specificity": [{"prompt": "Peru lies in", "ground_truth": "America"}]},
}
QUIET = [
    "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--model.evaluation.fluency_tokens=0", "--data.batch_size=1",
]  # fmt: skip
MEND = ["--model.editor=Mend", "--model.editor.rank=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with LMs of both shapes, data, a checkpoint, and things that are none of these."""
    root = tmp_path_factory.mktemp("bad")
    for architecture in ("gpt2", "llama"):
        recipe = Recipe(architecture=architecture, width=16, layers=3, heads=2, vocab=600, context=128)
        new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / architecture)
        tokenizer.save_pretrained(root / architecture)
    (root / "empty").mkdir()
    shutil.copytree(root / "gpt2", root / "broken")
    (root / "broken" / "model.safetensors").write_bytes(b"no tensors")
    shutil.copytree(root / "gpt2", root / "wordless")
    (root / "wordless" / "tokenizer.json").write_text("{}")
    data = {
        "good": [RECORD],
        "missing-field": [RECORD, {k: v for k, v in RECORD.items() if k != "target_new"}],
        "mistyped": [RECORD | {"prompt": 3}],
        "mistyped-deep": [RECORD | {"locality": {"Specificity": [{"prompt": "a", "ground_truth": 7}]}}],
        "empty-target": [RECORD | {"target_new": "  "}],
        "long-target": [RECORD | {"target_new": "long " * 200}],
        "no-list": {"records": [RECORD]},
        "nothing": [],
    }
    for name, value in data.items():
        (root / f"{name}.json").write_text(json.dumps(value))
    (root / "wrong.json").write_text('[\n{"prompt": "a",}\n]')
    (root / "binary.json").write_bytes(b"\xff\xfe\x00")
    (root / "table.tsv").write_text("a,b\n")
    (root / "syntax.yaml").write_text("model: [1\n")
    (root / "misspelt.yaml").write_text("model:\n  lerning_rate: 1\n")
    (root / "text.ckpt").write_text("hello")
    (root / "pickle.ckpt").write_bytes(b"\x80\x04cos\nsystem\n.")
    torch.save({"state_dict": {}}, root / "foreign.ckpt")
    good = f"[{{name: counterfact, source: {root}/good.json}}]"
    where = [f"--model.lm.name={root}/gpt2", f"--data.train={good}", f"--data.val={good}"]
    run(["fit", *QUIET, *MEND, *where, "--trainer.logger=false", f"--trainer.default_root_dir={root}/fitted"])
    return root


@pytest.fixture
def fails(place, capsys, monkeypatch):
    """Runs a command that must fail; gives its message."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def check(*args):
        capsys.readouterr()
        try:
            status = main(list(args))
        except SystemExit as exit_:
            status = exit_.code
        printed = capsys.readouterr().err
        assert status not in (0, None)
        assert "Traceback" not in printed
        lines = [line for line in printed.splitlines() if "error" in line.lower() or "usage" in line.lower()]
        assert len(lines) == 1, f"{len(lines)} lines of error, the last: {lines[-1:]}"
        assert lines[0].startswith("instructedit: error: ")
        assert printed.rstrip().endswith(lines[0])
        if (place / "mlruns" / "mlflow.db").exists():
            assert all(run.info.status != "FINISHED" for run in recent_runs(place / "mlruns", children=True))
        return lines[0]

    return check


def fit(place, *more, command="fit", editor=MEND, data="good", task="counterfact"):
    good = f"[{{name: counterfact, source: {place}/good.json}}]"
    source = f"[{{name: {task}, source: {place}/{data}{'' if '.' in data else '.json'}}}]"
    parts = [f"--data.train={source}", f"--data.val={good}"] if command == "fit" else [f"--data.test={source}"]
    store = [f"--trainer.logger.init_args.root={place}/mlruns"]
    return [command, *QUIET, *store, f"--model.lm.name={place}/gpt2", *editor, *parts, *more]


DATA = {
    "missing": ("absent.json", "absent.json: no such file"),
    "unreadable": ("binary.json", "binary.json: not UTF-8 text at byte 0"),
    "another format": ("table.tsv", "table.tsv: not a .json"),
    "wrong JSON": ("wrong", "wrong.json: wrong JSON at line 2, column 16"),
    "no list": ("no-list", "no-list.json: expected a list"),
    "nothing in it": ("nothing", "nothing.json"),
    "missing field": ("missing-field", "missing-field.json, record 1: field 'target_new' is missing"),
    "mistyped field": ("mistyped", "mistyped.json, record 0: field 'prompt': expected text, got int"),
    "mistyped field below": ("mistyped-deep", "record 0: field 'locality.Specificity[0].ground_truth'"),
    "empty target": ("empty-target", "empty-target.json, record 0: field 'target_new' is empty"),
    "target without room": ("long-target", "/0: the answer 'long long"),
}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(("data", "said"), DATA.values(), ids=DATA)
def test_data(fails, place, data, said, command):
    editor = MEND if command == "fit" else ["--model.editor=FtL"]  # an untrained editor is refused before
    assert said in fails(*fit(place, data=data, command=command, editor=editor))


def test_a_prompt_that_truncation_would_empty(fails, place):
    said = fails(*fit(place, "--model.lm.max_length=3"))
    assert "record counterfact/train/0" in said
    assert "max_length=3" in said
    assert "max_length=2" in fails(*fit(place, "--data.max_length=2"))


OPTIONS = {
    "unknown task option": (["--data.train=[{name: zsre, options: {cases: 3}}]"], "task 'zsre'"),
    "task twice": (["--data.train=[{name: zsre}, {name: zsre}]"], "'zsre' is listed twice"),
    "no sites": (["--model.editor.site_names=['*.nothing']"], "no edit site is called '*.nothing'"),
    "no block": (["--model.editor.blocks=[7]"], "block 7"),
    "missing model": (["--model.lm.name=./absent"], "'./absent'"),
    "missing model on the hub": (["--model.lm.name=nobody-at-all/nothing"], "'nobody-at-all/nothing'"),
    "empty model folder": (["--model.lm.name=empty"], "empty: no model here (config.json is missing)"),
    "broken weights": (["--model.lm.name=broken"], "broken"),
    "broken tokenizer": (["--model.lm.name=wordless"], "wordless"),
    "unknown dtype": (["--model.lm.dtype=float7"], "unknown dtype 'float7'"),
    "integer dtype": (["--model.lm.dtype=int8"], "unknown dtype 'int8'"),
    "misspelt option": (["--model.lerning_rate=1"], "--model.lerning_rate"),
    "misspelt option of the editor": (["--model.editor.rnk=1"], "rnk"),
    "misspelt field of a task": (["--data.train=[{name: zsre, sorce: x}]"], "sorce"),
    "value of another type": (["--model.lr=fast"], "model.lr"),
    "unknown config": (["--config=absent.yaml"], "absent.yaml"),
    "config that is no YAML": (["--config=syntax.yaml"], "syntax.yaml"),
    "config with a misspelt option": (["--config=misspelt.yaml"], "lerning_rate"),
}


@pytest.mark.parametrize(("more", "said"), OPTIONS.values(), ids=OPTIONS)
def test_options(fails, place, more, said):
    assert said in fails(*fit(place, *more))


def test_unknown_task(fails, place):
    said = fails(*fit(place, task="nosuch"))
    assert "unknown task 'nosuch'; there are: " in said
    assert "counterfact" in said


def test_unknown_editor(fails, place, tokenizer):
    said = fails(*fit(place, editor=["--model.editor=Foo"]))
    assert "Foo" in said
    assert "Mend" in said  # what there is
    assert "model.editor" in fails(*fit(place, editor=[]))
    lm = ie.FrozenLM.from_pretrained(str(place / "gpt2"))
    with pytest.raises(UserError, match=r"unknown editor 'Foo'; there are: .*mend"):
        ie.build_editor("Foo", lm)
    with pytest.raises(UserError, match=r"editor 'mend'.*rnk"):
        ie.build_editor("mend", lm, rnk=3)


CHECKPOINTS = {
    "missing": ("absent.ckpt", "absent.ckpt: no such file"),
    "text": ("text.ckpt", "text.ckpt: not a checkpoint"),
    "code": ("pickle.ckpt", "pickle.ckpt: not a checkpoint"),
    "another program's": ("foreign.ckpt", "foreign.ckpt: not a checkpoint"),
}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(("file", "said"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints(fails, place, file, said, command):
    assert said in fails(*fit(place, f"--ckpt_path={place}/{file}", command=command))
    lm = ie.FrozenLM.from_pretrained(str(place / "gpt2"))
    with pytest.raises(UserError, match=file):
        ie.load_editor(place / file, lm)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_checkpoint_of_another_architecture(fails, place, command):
    checkpoint = next((place / "fitted").rglob("*.ckpt"))
    more = [f"--ckpt_path={checkpoint}", f"--model.lm.name={place}/llama"]
    said = fails(*fit(place, *more, command=command))
    assert "another shape of model" in said
    assert f"{place}/gpt2" in said
    assert f"{place}/llama" in said


EDIT = ["edit", "--prompt=Peru lies in", "--target=Asia", "--lm=gpt2"]
COMMANDS = {
    "unknown command": (["fitt"], "unknown command 'fitt' (did you mean 'fit'?); there are: fit, "),
    "edit, unknown editor": ([*EDIT, "--editor=nosuch"], "nosuch"),
    "edit, untrained editor": ([*EDIT, "--editor=mend"], "editor 'mend' must be trained first"),
    "edit, unknown hyper-parameter": ([*EDIT, "--editor=ft_l", '--options={"rate": 1}'], "rate"),
    "edit, hyper-parameters of a trained editor": (
        [*EDIT, "--editor=.", '--options={"lr": 1}'],
        "lr is as it was in training",
    ),
    "edit, empty prompt": ([*EDIT, "--editor=unedited", "--prompt="], "prompt must be a non-empty string"),
    "edit, missing model": ([*EDIT, "--editor=unedited", "--lm=./absent"], "'./absent'"),
    "edit, missing option": (EDIT, "editor"),
    "edit, misspelt option": ([*EDIT, "--editor=unedited", "--taks=zsre"], "taks"),
    "experiment, unknown": (["experiment", "nosuch"], "unknown experiment 'nosuch'; there are: "),
    "experiment, scale": (["experiment", "demo", "--scale=huge"], "unknown scale 'huge'; there are: gemma-3-270m, "),
    "experiment, row": (["experiment", "demo", "--rows=[nosuch]"], "unknown row 'nosuch'; there are: "),
    "pretrain, architecture": (["pretrain", "--out=x", "--architecture=rnn"], "architecture"),
}


@pytest.mark.parametrize(("args", "said"), COMMANDS.values(), ids=COMMANDS)
def test_commands(fails, args, said):
    assert said in fails(*args)


def test_the_traceback_on_demand(monkeypatch, place):
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(UserError, match="no such file"):
        main(fit(place, data="absent.json"))
