"""Where things are kept, and what cannot be written is found out before any work."""

import pytest

from instructedit.errors import UserError
from instructedit.paths import cache_folder, check_writable


def test_things_are_kept_under_the_home_without_a_folder_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.delenv("INSTRUCTEDIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "instructedit"
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_a_folder_that_can_be_written_is_not_made(tmp_path):
    assert check_writable(tmp_path / "a" / ".." / "b" / "c", "--save") == tmp_path / "b" / "c"
    assert check_writable(tmp_path, "--save") == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^--merge .*file.* a file, not a folder$"):
        check_writable(tmp_path / "file" / below, "--merge")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_refuses_files_is_named():
    with pytest.raises(UserError, match=r"^--save /proc/nowhere: /proc cannot be written \("):
        check_writable("/proc/nowhere", "--save")
