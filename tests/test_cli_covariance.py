"""``instructedit covariance``: what it computes, keeps, says, and refuses."""

import re

import pytest
import torch
from safetensors.torch import load_file

import instructedit as ie
from instructedit.cli import main
from instructedit.lm import own_text
from instructedit.lm.covariance import covariance_file, covariances
from instructedit.testbed.pretrain import Recipe, new_model

LINE = re.compile(r"(\S+): (\d+) × (\d+), ([\d.]+) MB, (computed|was there), trace (\S+)")


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("covariance") / "lm"
    recipe = Recipe(architecture="gpt2", width=16, layers=4, heads=2, vocab=600, context=128)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


@pytest.fixture
def said(capsys, lm_folder):
    def run(*options):
        capsys.readouterr()
        status = main(["covariance", f"--lm={lm_folder}", *options])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_moments_are_computed_once_and_found_by_the_editor(said, lm_folder, cache, monkeypatch):
    options = ["--editor=memit", "--tokens=600", "--blocks=[1, -1]"]
    lm = ie.FrozenLM.from_pretrained(str(lm_folder))
    for state in ("computed", "was there"):
        status, out, err = said(*options)
        assert status == 0
        assert ("600 tokens of text that it samples itself" in err) == (state == "computed")
        lines = [LINE.fullmatch(line).groups() for line in out.splitlines()]
        assert [line[0] for line in lines] == ["transformer.h.1.mlp.c_proj", "transformer.h.3.mlp.c_proj"]
        for name, rows, columns, size, found, trace in lines:
            file = covariance_file(lm, name, "sampled", 600)
            matrix = load_file(file)["second_moment"]
            assert (int(rows), int(columns), found) == (*matrix.shape, state) == (64, 64, state)
            assert float(size) == pytest.approx(file.stat().st_size / 1e6, abs=0.05)
            assert float(trace) == pytest.approx(matrix.trace().item(), rel=1e-3)
    assert len(list(cache.iterdir())) == 2

    def texts(*source):
        raise AssertionError("the text was read again")

    monkeypatch.setattr(own_text, "_sampled", texts)
    editor = ie.build_editor("memit", lm, tokens=600, blocks=[1, -1], contexts=0, steps=1)
    edit = editor.edit([ie.EditRequest("The capital of France is", "Lyon", subject="France")])
    assert list(edit.sites) == [line[0] for line in lines]


def test_a_file_of_text_and_named_layers(said, lm_folder, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("The capital of France is Paris.\n\nA man came from the sea.\n")
    status, out, _ = said(f"--text={text}", "--blocks=[2]", '--site_names=["*.c_fc"]', "--tokens=9")
    assert status == 0
    ((name, rows, *_),) = (LINE.fullmatch(line).groups() for line in out.splitlines())
    assert (name, rows) == ("transformer.h.2.mlp.c_fc", "16")
    lm = ie.FrozenLM.from_pretrained(str(lm_folder))
    kept = load_file(covariance_file(lm, name, str(text), 9))["second_moment"]
    covariance_file(lm, name, str(text), 9).unlink()
    assert torch.equal(kept, covariances(lm, [name], str(text), 9)[name])


def test_the_layers_of_rome_are_the_default(said):
    status, out, _ = said("--tokens=50")
    assert status == 0
    assert [LINE.fullmatch(line)[1] for line in out.splitlines()] == ["transformer.h.1.mlp.c_proj"]  # 17/48 of 4


def test_a_scale_says_the_model_and_the_editors_layers(capsys, lm_folder, tmp_path):
    rome = "model: {editor: {class_path: Rome, init_args: {blocks: [2], tokens: 30, steps: 3}}}"
    for name, text in (
        ("lm.yaml", f"model: {{lm: {{name: {lm_folder}, dtype: bfloat16}}}}"),
        ("own/rome.yaml", rome),
        ("scale.yaml", "lm: lm.yaml\ntrainer: tiny\ndata: []\neditors: [./own]\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for more, block in ([], 2), (["--blocks=[0]"], 0):
        layer = f"transformer.h.{block}.mlp.c_proj"
        assert main(["covariance", f"--scale={tmp_path}/scale.yaml", *more]) == 0
        assert LINE.fullmatch(capsys.readouterr().out.strip())[1] == layer
        lm = ie.FrozenLM.from_pretrained(str(lm_folder), "bfloat16")
        assert covariance_file(lm, layer, "auto", 30).is_file()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--text=nowhere.txt", "nowhere.txt: no such file of text"),
        ("--blocks=[9]", "block 9: the model has 4 blocks"),
        ("--blocks=[1, 2]", "editor 'rome' edits one layer"),
        ('--site_names=["*.nowhere"]', "no edit site is called '*.nowhere'"),
        ("--editor=mend", "mend"),
        ("--dtype=float12", "unknown dtype 'float12'"),
        ("--tokens=many", "tokens"),
        ("--lm=nowhere", "no model 'nowhere'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(said, cache, option, message):
    status, out, err = said(option)
    assert (status, out) == (2, "")
    *before, line = err.splitlines()  # a progress bar may stand before it
    assert line.startswith("instructedit: error: ")
    assert message in line
    assert not any("error" in other for other in before)
    assert not cache.exists()
