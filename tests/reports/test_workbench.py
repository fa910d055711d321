"""The page to play with: what its buttons do, for two visitors at once, and the page itself where Gradio is there."""

import builtins
import tempfile
import threading
import zipfile
from collections import Counter

import pytest

from instructedit.analysis import EditingAreas, cosines
from instructedit.cli import main
from instructedit.editors import build_editor
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.reports import area_map, workbench
from instructedit.reports.area_map import LANDMARKS, OF_EACH, YOURS
from instructedit.reports.workbench import Visit, Workbench
from instructedit.tasks import load_records, task_title

FACT = ("tiny", "ft_l", "The capital of France is", "Rome")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Workbench(tmp_path_factory.mktemp("store"), ["tiny"])


@pytest.fixture(scope="module")
def edited(bench):
    visit = Visit()
    return visit, bench.edit(visit, *FACT, neighbours="The capital of Chile is\n\n")


def test_an_edit_is_reported_kept_packed_and_undone(bench, edited):
    visit, page = edited
    assert page.startswith('<iframe title="edit report" sandbox="" ')
    assert "took" in page
    assert [a.prompt for a in visit.report.requests[0].of("neighbour")] == ["The capital of Chile is"]
    with zipfile.ZipFile(bench.pack(visit)) as packed:
        assert {"edit.json", "edit.safetensors", "report.json", "requests.json", "model.json"} <= set(packed.namelist())
    assert bench.keep(visit, "rome").startswith("kept as rome")
    assert (bench.store / "rome" / "model.json").is_file()
    with pytest.raises(UserError, match="you kept no edit 'rome'"):
        bench.undo(Visit(), "rome")  # another visitor's
    assert "the model is what it was" in bench.undo(visit, " rome ")
    assert list(bench.store.iterdir()) == []


def test_downloads_are_gone_with_the_workbench(edited, tmp_path, monkeypatch):
    visit, _ = edited
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    own = Workbench(tmp_path / "store", ["tiny"])
    first, second = own.pack(visit), own.pack(visit)
    assert first != second
    with zipfile.ZipFile(first) as packed:  # the next download takes nothing away
        assert packed.testzip() is None
    del own
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_a_visitor_types_is_text(bench, monkeypatch):
    visit = Visit()
    found = bench.edit(visit, "tiny", "unedited", 'The </iframe><script>x</script> "capital" is', "Rome")
    assert "<script>" not in found
    assert found.count("<iframe") == found.count("</iframe>") == 1


def test_an_edit_has_its_place_on_the_map(bench, tmp_path):
    """Its own request made again lies where it lies; the areas of an editor are made once for a visit's edit."""
    lm = FrozenLM.from_pretrained("tiny")
    editor = build_editor("mend", lm, rank=4, edit_rate=0.01)
    editor.save_pretrained(tmp_path / "mend")
    records, _ = load_records("recent", "tiny", "test")
    visit, request = Visit(), records[0].request
    bench.edit(visit, "tiny", str(tmp_path / "mend"), request.prompt, request.target)
    figure = bench.map(visit)
    known = visit.known
    assert Counter(known.tasks) == dict.fromkeys(map(task_title, LANDMARKS), OF_EACH)
    assert len(figure.axes) == len(visit.report.edits[0].sites)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(legend) == {*map(task_title, LANDMARKS), YOURS}
    for axes in figure.axes:
        spots = {each.get_label(): each.get_offsets() for each in axes.collections}
        yours = spots[YOURS]
        assert len(yours) == 1
    again = EditingAreas.concat([known, area_map._areas(visit.report.edits[0], [YOURS], YOURS)])
    near = cosines(again, again.site_names[0])[-1, :-1].argmax()
    assert again.ids[near] == records[0].id
    assert bench.map(visit) is not figure
    assert visit.known is known


def test_edits_without_areas_have_no_map(bench, edited):
    with pytest.raises(UserError, match="a map needs a trained editor"):
        bench.map(edited[0])
    with pytest.raises(UserError, match="no edit yet"):
        bench.map(Visit())


def test_mistakes_are_one_line(bench):
    for given, message in (
        (("other", *FACT[1:]), "no model 'other' on this page"),
        (("tiny", "mend", *FACT[2:]), "must be trained first"),
        (("tiny", "ft_l", " ", "x"), "prompt must be a non-empty string"),
    ):
        with pytest.raises(UserError, match=message):
            bench.edit(Visit(), *given)
    for action in (bench.pack, lambda visit: bench.keep(visit, "x")):
        with pytest.raises(UserError, match="no edit yet"):
            action(Visit())


def test_two_visitors_are_served_one_after_the_other(bench, monkeypatch):
    inside, most = [], []

    def edit(lm, editor, case):
        inside.append(case)
        most.append(len(inside))
        threading.Event().wait(0.05)
        inside.pop()
        return case

    monkeypatch.setattr(workbench, "edit", edit)
    monkeypatch.setattr(workbench, "page_of", lambda report: report.request.target)
    visits, found = [Visit(), Visit()], {}

    def ask(number):
        found[number] = bench.edit(visits[number], "tiny", "ft_l", "The capital is", str(number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert found == {0: "0", 1: "1"}
    assert [visit.report.request.target for visit in visits] == ["0", "1"]


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gradio":
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["ui"]) == 2
    assert "pip install 'instructedit[ui]'" in capsys.readouterr().err


def test_the_page_has_all_buttons(bench):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    from instructedit.commands.ui import page

    blocks = page(bench)
    labels = {getattr(each, "label", None) or getattr(each, "value", None) for each in blocks.blocks.values()
              if type(each).__name__ in ("Button", "Textbox", "Dropdown")}  # fmt: skip
    assert {"Model", "Editor", "Prompt", "Target", "Edit", "Keep", "Undo", "Download"} <= labels
    assert any(str(label).startswith("Map of editing areas") for label in labels)
    assert len(blocks.fns) == 5
