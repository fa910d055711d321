"""Where a trained editor is, by the name of its run or as the latest."""

import pytest

from instructedit.editors.sources import find_editor, is_place
from instructedit.errors import UserError
from instructedit.tracking import MLflowTracker


@pytest.fixture
def store(tmp_path):
    """Five runs, one after the other: id by name; the last two are no finished fits."""
    ids = {}
    for name, status, saved in (
        ("first", "success", True), ("twice", "success", True), ("twice", "success", True), ("last", "success", True),
        ("failed", "failed", True), ("test", "success", False),
    ):  # fmt: skip
        tracker = MLflowTracker(run_name=name, root=tmp_path, experiment_name=name)
        _ = tracker.experiment
        if saved:
            folder = tmp_path / tracker.experiment_id / tracker.run_id / "checkpoints"
            folder.mkdir(parents=True)
            (folder / "last.ckpt").touch()
        tracker.finalize(status)
        ids.setdefault(name, []).append(tracker.run_id)
    return tmp_path, ids


def test_latest_is_the_finished_run_with_checkpoints_that_ended_last(store):
    root, ids = store
    assert find_editor("latest", root).parts[-3:] == (ids["last"][0], "checkpoints", "last.ckpt")


def test_a_run_goes_by_its_name_unless_several_have_it(store):
    root, ids = store
    assert find_editor("first", root).parts[-3] == ids["first"][0]
    with pytest.raises(UserError, match=r"twice: 2 finished runs .* have this name") as error:
        find_editor("twice", root)
    assert all(each in str(error.value) for each in ids["twice"])
    for name in ("failed", "test", "nobody"):
        assert not is_place(name, root)
        with pytest.raises(UserError, match=f"{name}: no such file, folder, run"):
            find_editor(name, root)
    assert is_place("first", root)


def test_no_store_and_no_run_are_errors(tmp_path):
    with pytest.raises(UserError, match="latest: there is no store of runs"):
        find_editor("latest", tmp_path / "none")
    with pytest.raises(UserError, match="latest: no finished run"):
        find_editor("latest", tmp_path)
    assert not is_place("anything", tmp_path / "none")
