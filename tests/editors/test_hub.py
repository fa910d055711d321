"""The hub path, with a folder in the hub's place."""

import shutil

import huggingface_hub
import pytest
import torch

from instructedit.editors import build_editor, load_editor
from instructedit.errors import UserError


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
