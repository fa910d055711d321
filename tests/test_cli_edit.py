"""`instructedit edit`: where its results go is found out before any work, and what it saves others can load."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM

import instructedit as ie
from instructedit.cli import main
from instructedit.configs import Scale
from instructedit.lm import pretrained
from instructedit.testbed.pretrain import Recipe, new_model

FT_L = ["--editor=ft_l", '--options={"lr": 0.1, "bound": 0.1, "steps": 1}']
PROMPT = "The capital of Peru is"


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("edit") / "lm"
    new_model(Recipe(architecture="llama", width=16, layers=3, heads=2, vocab=600, context=128), 0).save_pretrained(
        root
    )
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture
def no_work(monkeypatch):
    """Any edit that is made fails the test."""

    def made(*args, **options):
        raise AssertionError("the edit was made")

    monkeypatch.setattr(ie.Editor, "edit", made)


def edit(lm, *more):
    return main(["edit", f"--prompt={PROMPT}", "--target=Lyon", f"--lm={lm}", "--max_new_tokens=2", *more])


def refused(capsys, lm, *more):
    assert edit(lm, *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("instructedit: error: ")
    return lines[-1]


def test_a_trained_editor_edits_the_model_that_it_was_trained_for(lm_folder, tmp_path, capsys):
    lm = ie.FrozenLM.from_pretrained(str(lm_folder))
    ie.build_editor("mend", lm, rank=2, edit_rate=0.1).save_pretrained(tmp_path / "mend")
    asked = ["edit", f"--prompt={PROMPT}", "--target=Lyon", f"--editor={tmp_path / 'mend'}", "--max_new_tokens=2"]
    assert main([*asked, f"--json={tmp_path / 'report.json'}"]) == 0
    assert f"lm: {lm_folder}, which this editor was trained for" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["lm"] == str(lm_folder)
    assert main([*asked, "--lm=tiny"]) == 2
    assert "whose tokenizer" in capsys.readouterr().err


# -- a scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*did not reach their target:UserWarning")  # in one step
def test_a_scale_says_the_model_and_the_editors_options(lm_folder, tmp_path):
    for name, text in (
        ("lm.yaml", f"model: {{lm: {{name: {lm_folder}}}}}"),
        ("own/ft_l.yaml", "model: {editor: {class_path: FtL, init_args: {lr: 0.1, bound: 0.1, steps: 1}}}"),
        ("scale.yaml", "lm: lm.yaml\ntrainer: tiny\ndata: []\neditors: [./own]\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    by_scale = ["edit", f"--prompt={PROMPT}", "--target=Lyon", f"--scale={tmp_path}/scale.yaml", "--editor=ft_l"]
    assert edit(lm_folder, *FT_L, f"--save={tmp_path}/a") == 0
    assert main([*by_scale, "--max_new_tokens=2", f"--save={tmp_path}/b"]) == 0
    assert main([*by_scale, "--max_new_tokens=2", f"--save={tmp_path}/c", '--options={"bound": 0.05}']) == 0
    a, b, c = (ie.load_edit(tmp_path / name) for name in "abc")
    (site,) = a.sites
    assert torch.equal(a.delta(site), b.delta(site))
    assert (b.delta(site).abs().max().item(), c.delta(site).abs().max().item()) == pytest.approx((0.1, 0.05), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*did not reach their target:UserWarning")
def test_a_model_that_a_scale_is_called_after_has_its_options(tmp_path):
    words = ["edit", f"--prompt={PROMPT}", "--target=Lyon", "--editor=ft_l", "--neighbours=[]", "--max_new_tokens=2"]
    tuned = Scale.load("tiny").editor_options("ft_l")
    plain = {"lr": 0.001, "steps": 1}
    for name, more, expected in (("a", [], tuned), ("b", ['--options={"lr": 0.001, "steps": 1}'], tuned | plain)):
        assert main([*words, "--lm=tiny", f"--json={tmp_path}/{name}", *more]) == 0
        options = json.loads((tmp_path / name).read_text())["options"]
        assert {key: options[key] for key in expected} == expected
    assert Scale.of_model("owner/tiny") is None


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["{x}", "{x}/", "{x}/../{name}", "link"])
def test_one_folder_for_edit_and_model_is_refused(capsys, lm_folder, tmp_path, no_work, spelling, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    other = spelling.format(x=tmp_path / "x", name="x")
    said = refused(capsys, lm_folder, *FT_L, f"--save={tmp_path}/x", f"--merge={other}")
    assert "name one folder: loading it would apply the edit twice" in said
    assert not (tmp_path / "x").exists()


def test_a_folder_with_the_other_in_it_is_refused(capsys, lm_folder, tmp_path, no_work):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(capsys, lm_folder, *FT_L, f"--merge={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "holds a model" in refused(capsys, lm_folder, *FT_L, f"--save={tmp_path}")


@pytest.mark.parametrize("option", ["save", "merge"])
@pytest.mark.parametrize(("place", "said"), [("file", "is a file"), ("file/x", "is a file"), ("/proc/x", "be written")])
def test_a_place_that_cannot_be_written_is_found_out_first(
    capsys, lm_folder, tmp_path, no_work, option, place, said
):  # fmt: skip
    (tmp_path / "file").write_text("mine")
    message = refused(capsys, lm_folder, *FT_L, f"--{option}={tmp_path / place}")
    assert f"--{option} {tmp_path / place}" in message
    assert said in message
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_are_where_a_shell_would_put_them(capsys, lm_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    places = ("--save=~/a", "--merge=~/m", "--json=~/new/r.json", "--html=new/r.html")
    assert edit(lm_folder, *FT_L, *places) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "m", "new"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.html", "r.json"]


@pytest.mark.parametrize("method", ["grace", "calinet", "t_patcher", "ike"])
def test_what_no_model_can_hold_is_not_merged(capsys, lm_folder, tmp_path, no_work, method):
    said = refused(capsys, lm_folder, f"--editor={method}", f"--merge={tmp_path}/x")
    assert f"--merge: edits of '{method}' are no change of weights" in said
    said = refused(capsys, lm_folder, f"--editor={method}", f"--save={tmp_path}/x", "--rank=8")
    assert f"--rank: edits of '{method}' are no change of weights" in said
    assert not (tmp_path / "x").exists()


def test_text_with_square_brackets_is_shown_as_it_is(capsys, lm_folder):
    assert edit(lm_folder, "--editor=unedited", "--prompt=The [/b] city [red]is", "--ask=['[/] x']") == 0
    printed = capsys.readouterr().out
    assert "The [/b] city [red]is" in printed
    assert "[/] x" in printed


# -- the report --------------------------------------------------------------------------------------------------------


def test_words_behind_an_option_are_its_list(capsys, lm_folder, tmp_path):
    asked = ["--ask", "[link](x)", "B b", "--rephrase", "Peru's capital is", "--neighbours", "A is", "B is"]
    assert edit(lm_folder, "--editor=unedited", *asked, f"--json={tmp_path}/r.json", f"--html={tmp_path}/r.html") == 0
    (found,) = json.loads((tmp_path / "r.json").read_text())["requests"]
    prompts = [(answer["role"], answer["prompt"]) for answer in found["answers"][1:]]
    assert prompts == [
        ("paraphrase", "Peru's capital is"), ("neighbour", "A is"), ("neighbour", "B is"), ("ask", "[link](x)"),
        ("ask", "B b"),
    ]  # fmt: skip
    assert "failed; 0 of 1 paraphrases follow; spread to none of 2 neighbours" in capsys.readouterr().out
    assert "[link](x)" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "what is to be changed? give --prompt and --target, or --requests FILE"),
        (["--prompt=p"], "give --prompt and --target"),
        (["--requests=none.csv"], "none.csv: no such file of requests"),
        (["--requests=r.csv", "--prompt=p"], "--requests: the file has the prompts"),
        (["--requests=r.csv", "--merge=x"], "there are 2 requests: add --joint"),
        (["--prompt=p", "--target=t", "--json=."], "--json .: is a folder"),
        (["--prompt=p", "--target=t", "--html=r.csv/x.html"], "is a file, not a folder"),
        (["--prompt=p", "--target=t", "--keep=x", "--store=."], "there is an edit 'x' already"),
        (["--requests=r.csv", "--keep=a/b"], "'a/b-000' is no name for an edit"),
        (["--prompt=p", "--target=t", "--rank=0", "--save=y"], "rank must be at least 1, got 0"),
        (["--requests=r.csv", "--batch_size=2"], "--batch_size is an option of a sequence: add --sequential"),
        (["--requests=bad.csv"], "bad.csv, record 0: field 'target' is missing"),
    ],
)
def test_what_is_asked_for_is_checked_first(capsys, lm_folder, tmp_path, no_work, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.csv").write_text("prompt,target\np,t\nq,t\n")
    (tmp_path / "x").mkdir()
    (tmp_path / "bad.csv").write_text("prompt,target\np,\n")
    assert main(["edit", f"--lm={lm_folder}", "--editor=unedited", *options]) == 2
    assert said in capsys.readouterr().err


# -- the base of an adapter -------------------------------------------------------------------------------------------


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def same_as_peft(lm, saved):
    """PEFT's auto class finds the base by what the adapter says."""
    ids = lm.tokenizer(PROMPT)["input_ids"]
    with lm.edited(ie.load_edit(saved)):
        expected = logits(lm.model, ids)
    assert not torch.allclose(expected, logits(lm.model, ids), atol=1e-2)
    found = AutoPeftModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    torch.testing.assert_close(logits(found, ids), expected, atol=2e-3, rtol=1e-3)


@pytest.fixture
def nudge(monkeypatch):
    """An untrained MEND with a large rate, in the place of a trained editor."""

    def load(source, lm):
        torch.manual_seed(0)
        return ie.build_editor("mend", lm, rank=4, edit_rate=30.0)

    monkeypatch.setattr("instructedit.editors.choosing.load_editor", load)


@pytest.mark.parametrize("name", ["tiny", "tiny-llama", "folder", "by pip"])
def test_peft_finds_the_base_by_the_adapter(name, nudge, lm_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "by pip":
        monkeypatch.setattr(pretrained, "known", lambda: {"by pip": None})
        monkeypatch.setattr(pretrained, "fetch", lambda name: lm_folder)
    if name == "folder":
        monkeypatch.chdir(lm_folder.parent)
    lm = lm_folder.name if name == "folder" else name  # a relative path
    assert edit(lm, "--editor=./trained", f"--save={tmp_path}/edit") == 0
    monkeypatch.chdir("/")
    config = json.loads((tmp_path / "edit" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("/")
    assert json.loads((tmp_path / "edit" / "edit.json").read_text())["lm"] == lm
    same_as_peft(ie.FrozenLM.from_pretrained(config["base_model_name_or_path"]), tmp_path / "edit")


def test_a_runs_id_is_an_editor(capsys, lm_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = "0" * 32
    assert "no run in mlruns" in refused(capsys, lm_folder, f"--editor={unknown}")
    assert "unknown editor 'nosuch'; there are: " in refused(capsys, lm_folder, "--editor=nosuch")


def test_a_file_of_requests_is_an_edit_each_or_one_of_all(capsys, lm_folder, tmp_path, nudge):
    (tmp_path / "r.csv").write_text("prompt,target\nThe capital of Peru is,Lyon\nThe capital of Chile is,Rhine\n")
    base = ["edit", f"--lm={lm_folder}", "--editor=./trained", f"--requests={tmp_path}/r.csv", "--rank=512"]
    assert main([*base, f"--json={tmp_path}/r.json", f"--save={tmp_path}/each"]) == 0
    assert main([*base, "--joint", f"--save={tmp_path}/all", f"--merge={tmp_path}/model"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert [each["request"]["target"] for each in report["requests"]] == ["Lyon", "Rhine"]
    printed = capsys.readouterr().out
    assert "of 2 requests took, spread to" in printed
    assert "of 2 requests took in one edit, spread to" in printed
    one, other, both = (ie.load_edit(tmp_path / name) for name in ("each/000", "each/001", "all"))
    for site in both.sites:
        torch.testing.assert_close(both.delta(site), one.delta(site) + other.delta(site))
    assert (tmp_path / "model" / "config.json").is_file()
