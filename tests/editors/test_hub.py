"""The hub path, with a folder in the hub's place."""

import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pandas as pd
import pytest
import torch
import yaml
from tests.conftest import random_lm

from instructedit.editors import build_editor, load_editor
from instructedit.editors.card import model_card
from instructedit.editors.mend import InstructEdit, Mend
from instructedit.errors import UserError
from instructedit.records import EditRequest
from instructedit.testbed.corpus import documents
from instructedit.testbed.pretrain import train_tokenizer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(tmp_path / repo_id))
    return tmp_path


def test_an_editor_goes_to_the_hub_and_comes_back(hub, lm):
    editor = build_editor("instructedit", lm, rank=8, edit_rate=0.5)
    editor.push_to_hub("user/editor")
    assert not any("lm_head" in path.read_text(errors="ignore") for path in (hub / "user/editor").iterdir())
    again = load_editor("user/editor", lm)
    assert (again.name, again.rank, again.instructions) == ("instructedit", 8, True)
    assert all(torch.equal(a, b) for a, b in zip(editor.parameters(), again.parameters(), strict=True))


def test_a_hub_that_does_not_answer_is_one_line(lm, monkeypatch):
    def refuse(repo_id, **_):
        raise OSError("404 Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="nobody/nothing"):
        load_editor("nobody/nothing", lm)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_how_it_is_loaded(hub, lm):
    summary = pd.DataFrame(
        [("mend", "zsre", "reliability", 91.23, 89.0, 93.0, 40), ("mend", "zsre", "locality", 97.0, 95.5, 98.1, 40)],
        columns=["method", "task", "metric", "mean", "low", "high", "n"],
    )
    build_editor("mend", lm, rank=8, edit_rate=0.5).push_to_hub("user/editor", results=summary)
    card = (hub / "user/editor/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "instructedit"
    assert "base_model" not in yaml.safe_load(front)  # a name of ours is none of the hub's
    assert "| zsre | reliability | 91.2 | 89.0 to 93.0 | 40 |" in body
    assert "Tasks: zsre." in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["mend"]["rank"] == 8
    program = body.split("```python\n")[1].split("```")[0]
    loads = {"FrozenLM": SimpleNamespace(from_pretrained=lambda name: {lm.name: lm}[name])}
    ours = SimpleNamespace(**loads, load_editor=load_editor, EditRequest=EditRequest)
    names = {"ie": ours}
    exec(program.replace("import instructedit as ie", ""), names)
    assert len(names["edit"]) == 1


def test_the_card_names_the_licence_of_a_model_that_is_known(lm, monkeypatch):
    monkeypatch.setattr(lm, "name", "smollm2-135m")
    assert "Licence of the base model: Apache-2.0 (https://" in model_card(lm, "mend", {}, None)
    monkeypatch.setattr(lm, "name", "owner/model")
    assert yaml.safe_load(model_card(lm, "mend", {}, None).split("---\n")[1])["base_model"] == "owner/model"


# -- another model -----------------------------------------------------------------------------------------------------


def test_another_tokenizer_or_shape_is_refused(lm, tokenizer, tmp_path):
    build_editor("mend", lm, rank=8, edit_rate=0.5).save_pretrained(tmp_path)
    architecture = lm.name.removeprefix("random-")
    deeper = random_lm(architecture, tokenizer, layers=5)
    site = build_editor("mend", lm, rank=8).sites[0].name
    with pytest.raises(UserError, match=re.escape(f"trained for {lm.name}: layer {site} is")) as found:
        load_editor(tmp_path, deeper)
    assert "not edited in" in str(found.value)
    other = random_lm(architecture, train_tokenizer(documents(1, 1), 600, 128))
    with pytest.raises(UserError, match=r"whose tokenizer \(600 tokens\) is not that of random-"):
        load_editor(tmp_path, other)
    card = json.loads((tmp_path / "editor.json").read_text())
    old = {name: card[name] for name in ("editor", "options", "lm", "sites")}
    (tmp_path / "editor.json").write_text(json.dumps(old))  # as an older version wrote it
    assert load_editor(tmp_path, other).name == "mend"


def test_an_editor_is_one_of_its_method(lm, tmp_path):
    build_editor("mend", lm, rank=8, edit_rate=0.5).save_pretrained(tmp_path)
    assert type(Mend.from_pretrained(tmp_path, lm)) is Mend
    with pytest.raises(UserError, match="holds an editor 'mend', not 'instructedit'"):
        InstructEdit.from_pretrained(tmp_path, lm)
