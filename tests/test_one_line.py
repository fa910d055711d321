"""Errors that once were tracebacks: stores, checkpoints, numbers, YAML, edits of another model; each is one line."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from tests.conftest import random_lm

import instructedit as ie
from instructedit import configs
from instructedit.cli import main
from instructedit.data.module import EditData, TaskSource
from instructedit.edits import DenseEdit
from instructedit.evaluation import Evaluation
from instructedit.paths import check_database
from instructedit.tasks import Task, load_records, sources

FIT = ["fit", "--model.editor=Mend", "--model.editor.rank=2", "--data.train=[{name: zsre}]", "--model.lm.name=tiny"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def check(*args):
        assert main(list(args)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
        assert line.startswith("instructedit: error: ")
        return line

    return check


def test_stores(refused, tmp_path):
    for name in ("broken", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/mlflow.db").write_bytes(b"no database")
    (tmp_path / "folder/mlflow.db").mkdir()
    (tmp_path / "file").touch()
    root = "--trainer.logger.init_args.root"
    assert "broken/mlflow.db: damaged: not a database" in refused(*FIT, f"{root}=broken")
    assert "folder/mlflow.db: cannot be written (Is a directory)" in refused(*FIT, f"{root}=folder")
    assert "file: is a file, not a folder" in refused(*FIT, f"{root}=file")
    assert "run_id 'a/../b': not the id of a run" in refused(*FIT, "--trainer.logger.init_args.run_id=a/../b")


def test_a_database_that_may_not_be_written(tmp_path, monkeypatch):
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"SQLite format 3\0...")
    check_database(file)

    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", read_only)
    with pytest.raises(ie.UserError, match=r"mlflow\.db: cannot be written \(Permission denied\)"):
        check_database(file)


@pytest.mark.parametrize("part", ["pytorch-lightning_version", "optimizer_states", "lr_schedulers", "global_step"])
def test_a_checkpoint_without_a_part(refused, tmp_path, part):
    whole = {
        "state_dict": {}, "hyper_parameters": {"editor": {"class_path": "Mend", "init_args": {}}}, "global_step": 1,
        "pytorch-lightning_version": "2.6.0", "optimizer_states": [], "lr_schedulers": [], "epoch": 0,
    }  # fmt: skip
    del whole[part]
    torch.save(whole, tmp_path / "a.ckpt")
    assert f"--ckpt_path a.ckpt: the checkpoint has no '{part}'" in refused(*FIT, "--ckpt_path=a.ckpt")


def test_a_checkpoint_with_options_that_there_are_not(refused, tmp_path):
    editor = {"class_path": "Mend", "init_args": {"nonsense": 3}}
    saved = {"state_dict": {}, "hyper_parameters": {"editor": editor}, "pytorch-lightning_version": "2.6.0"}
    torch.save(saved, tmp_path / "a.ckpt")
    assert "--ckpt_path: options of its editor: " in refused("test", *FIT[1:], "--ckpt_path=a.ckpt")


NUMBERS = {
    "batch_size": 0, "eval_batch_size": 0, "num_workers": -1, "val_size": -1, "rephrases": -1, "locality": -2,
    "replies": -1, "max_length": 0, "portability": -1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NUMBERS.items())
def test_numbers_of_the_data(name, value):
    with pytest.raises(ie.UserError, match=f"{name} must be at least [01], got {value}"):
        EditData(**{name: value})


def test_other_numbers(tokenizer):
    for make, said in (
        (lambda: Evaluation(tokens=0), "tokens must be at least 1"),
        (lambda: Evaluation(fluency_tokens=-1), "fluency_tokens must be at least 0"),
        (lambda: TaskSource("zsre", size=0), "size of task 'zsre' must be at least 1"),
        (lambda: TaskSource("zsre", weight=0.0), "weight of task 'zsre'"),
        (lambda: TaskSource("zsre", weight=float("nan")), "weight of task 'zsre'"),
        (lambda: ie.build_editor("ft_l", random_lm("gpt2", tokenizer), lr="abc"), "'ft_l': lr must be a number"),
        (lambda: ie.build_editor("ft_l", random_lm("gpt2", tokenizer), lr=float("nan")), "'ft_l': lr must be a number"),
        (lambda: ie.build_editor("grace", random_lm("gpt2", tokenizer), steps=-1), "steps must be at least 0"),
        (lambda: ie.build_editor("ft_l", random_lm("gpt2", tokenizer), steps=None), "steps must be a number, got None"),
    ):
        with pytest.raises(ie.UserError, match=said):
            make()
    assert ie.build_editor("ft_l", random_lm("gpt2", tokenizer), lr="auto", bound=None).lr == "auto"


@pytest.mark.parametrize("option", ["--config", "--scale"])
def test_yaml(refused, tmp_path, option):
    contents = {
        "empty": ("", "empty.yaml"), "list": ("- 1\n", "list.yaml"), "deep": ("a: " + "[" * 500, "deep.yaml"),
        "twice": ("lm: tiny\nlm: other\n", "twice.yaml: not YAML: the key 'lm' stands twice"),
        "itself": ("a: &a [*a]\nb: *a\n", "itself.yaml"),
    }  # fmt: skip
    for name, (content, said) in contents.items():
        (tmp_path / f"{name}.yaml").write_text(content)
        assert said in refused(FIT[0], f"{option}={name}.yaml", *FIT[1:])


def test_aliases_may_be_used_but_not_multiply():
    assert configs.load_yaml("a: &a [1]\nb: {<<: {c: 2}, d: *a}\n") == {"a": [1], "b": {"c": 2, "d": [1]}}
    many = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(8))
    with pytest.raises(configs.yaml.YAMLError, match="more than 1,000,000 values"):
        configs.load_yaml(many)


# -- records ---------------------------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    record = {"prompt": "The capital is", "target_new": "Lyon", "rephrase": ["Its capital", "half \ud800"]}
    (tmp_path / "r.json").write_text(json.dumps([record]))
    with pytest.raises(ie.UserError, match=r"r\.json, record 0: field 'rephrase\[1\]' holds half a surrogate pair"):
        load_records("counterfact", str(tmp_path / "r.json"))
    one = {**record, "rephrase": "half \ud800"}
    (tmp_path / "r.json").write_text(json.dumps([one]))
    with pytest.raises(ie.UserError, match=r"r\.json, record 0: field 'rephrase' holds half a surrogate pair"):
        load_records("counterfact", str(tmp_path / "r.json"))
    with pytest.raises(ie.UserError, match="prompt holds half a surrogate pair"):
        ie.EditRequest("half \udfff", "Lyon")
    assert ie.EditRequest("whole \U0001f600", "Lyon").prompt == "whole \U0001f600"


def test_a_probe_that_cannot_be_made_says_which_record_it_is_of(tmp_path):
    """Whatever a reader passes on unread."""

    class Careless(Task):
        name = title = "careless"

        def parse(self, raw, report):
            yield ie.EditRecord(
                "0", ie.EditRequest("a", "b"), (ie.Probe("locality", raw.text("ask"), ("half \ud800",)),)
            )

    (tmp_path / "r.json").write_text('[{"ask": "who?"}]')
    with pytest.raises(ie.UserError, match=r"r\.json, record 0: locality probe 'who\?': holds half"):
        load_records(Careless(), str(tmp_path / "r.json"))


def test_a_small_packed_file_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGEST", 1 << 20)
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    with pytest.raises(ie.UserError, match=r"bomb\.json\.gz: more than 0 GiB unpacked"):
        load_records("counterfact", str(tmp_path / "bomb.json.gz"))


# -- edits of another model -----------------------------------------------------------------------------------------


def test_an_edit_of_another_model(tokenizer, tmp_path):
    lm, other = random_lm("gpt2", tokenizer), random_lm("llama", tokenizer)
    edit = ie.build_editor("ft_l", lm, steps=1, lr=0.1).edit([ie.EditRequest("The capital of France is", "Rome")])
    for use in (
        lambda: other.merge(edit),
        lambda: other.save(edit, tmp_path / "saved"),
        lambda: other.generate("France", max_new_tokens=1, edit=edit),
    ):
        with pytest.raises(ie.UserError, match="has no edit site"):
            use()
    assert not (tmp_path / "saved").exists()
    wider = DenseEdit.of({name: torch.nn.functional.pad(edit.delta(name), (0, 1)) for name in edit.sites})
    with pytest.raises(ie.UserError, match="of another model"):
        lm.merge(wider)
