"""Plain texts from every kind of source, and what is said of one that cannot be read."""

import gzip
import itertools
import json
import lzma

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructedit.errors import UserError
from instructedit.tasks.texts import read_texts
from instructedit.testbed.corpus import documents

TEXTS = ["The capital of France is Paris.", "One line\nand another", "Ωμέγα, 東京 and 🦊"]
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".GZ": gzip.compress}
WRITE = {
    "plain.txt": lambda: "\n\n".join(TEXTS) + "\n",
    "many-blanks.text": lambda: "\n \n" + "\n\n\n \t\n".join(TEXTS) + "\n\n\n",
    "no-suffix": lambda: "\n\n".join(TEXTS),
    "windows.txt": lambda: "\r\n\r\n".join(text.replace("\n", "\r\n") for text in TEXTS),
    "lines.jsonl": lambda: "".join(json.dumps({"text": text, "title": "t"}) + "\n" for text in TEXTS),
    "LINES.JSONL": lambda: "\n".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS),
}


def read(source):
    """A text of lines may end with its last line's end."""
    return [text.removesuffix("\n") for text in read_texts(str(source))]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_texts(tmp_path, name, packing, mark):
    path = tmp_path / (name + packing)
    path.write_bytes(PACK[packing](mark + WRITE[name]().encode()))
    assert read(path) == TEXTS


WORDS = st.text("ab ,.é", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(texts=st.lists(st.lists(WORDS, min_size=1, max_size=3), max_size=5), blanks=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_blank_lines_part_texts_and_nothing_else_does(tmp_path_factory, texts, blanks):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    wanted = ["\n".join(lines) for lines in texts]
    path.write_text(("\n" + "\n" * blanks).join(wanted))
    assert read(path) == wanted


@given(texts=st.lists(st.text(max_size=20), max_size=5))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back_from_json_lines(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(read_texts(str(path))) == texts


def test_texts_come_one_by_one(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "good"}\n' * 3 + "bad\n")
    found = read_texts(str(path))
    assert [next(found) for _ in range(3)] == ["good"] * 3  # before the bad line is reached
    with pytest.raises(UserError, match="line 4"):
        next(found)


def test_the_embedded_corpus_is_the_default():
    wanted = list(itertools.islice(documents(0, 10), 20))
    assert list(itertools.islice(read_texts(), 20)) == wanted
    assert list(itertools.islice(read_texts("tiny"), 20)) == wanted


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("At home")
    assert read("~/text.txt") == ["At home"]


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub, which answers with records or an error."""
    asked, answer = [], {"records": [{"text": text, "id": 1} for text in TEXTS]}

    def load(repo_id, **options):
        asked.append((repo_id, options))
        if "error" in answer:
            raise answer["error"]
        return iter(answer["records"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked, answer


def test_an_owner_and_a_name_are_a_dataset_that_is_streamed(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked, _ = hub
    assert read("owner/name") == TEXTS
    assert asked == [("owner/name", {"split": "train", "streaming": True})]
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("A file of that name comes first")
    assert read("owner/name") == ["A file of that name comes first"]
    assert len(asked) == 1


def test_a_dataset_with_a_dot_in_its_name_is_one(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read("owner/name-v1.5") == TEXTS


def test_what_the_hub_says_is_told_in_one_line(hub):
    _, answer = hub
    answer["error"] = RuntimeError("no such dataset\nand much more")
    with pytest.raises(UserError, match=r"^owner/name: no texts to be had from the hub: no such dataset$"):
        read("owner/name")
    answer["error"] = ConnectionError()
    with pytest.raises(UserError, match=r"owner/name: .*ConnectionError"):
        read("owner/name")


def test_a_dataset_without_a_field_text_is_refused(hub):
    _, answer = hub
    answer["records"] = [{"content": "x"}]
    with pytest.raises(UserError, match=r"owner/name: .*text"):
        read("owner/name")


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere.txt", "a/b/c", "./here/text", "owner/name.txt", "word"])
def test_nothing_there_is_told_by_name(hub, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{source}: no such file of text"):
        read(source)
    with pytest.raises(UserError, match=f"{tmp_path}: no such file"):
        read(tmp_path)  # a folder
    assert hub[0] == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("no json", "JSONDecodeError"),
        ('{"text": "cut', "JSONDecodeError"),
        ('{"title": "t"}', "KeyError"),
        ("[1]", "TypeError"),
        ("3", "TypeError"),
        ("null", "TypeError"),
        ('"text"', "TypeError"),
        ('{"text": 3}', "no string"),
        ('{"text": null}', "no string"),
        ('{"text": ["a"]}', "no string"),
    ],
)
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_line_that_is_no_text_is_named_with_its_file(tmp_path, line, why, packing):
    path = tmp_path / f"some.jsonl{packing}"
    path.write_bytes(PACK[packing](('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n').encode()))
    with pytest.raises(UserError, match=rf"some\.jsonl{packing}, line 3: .*{why}"):
        read(path)


def test_brackets_without_end_are_named_too(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": "good"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"deep\.jsonl, line 2"):
        read(path)


@pytest.mark.parametrize("packing", PACK)
def test_bytes_that_are_no_utf8_are_told(tmp_path, packing):
    path = tmp_path / f"text.txt{packing}"
    path.write_bytes(PACK[packing](b"good\n\n\xff\xfe"))
    with pytest.raises(UserError, match=rf"text\.txt{packing}: not UTF-8 text"):
        read(path)


@pytest.mark.parametrize("packing", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "plain", "empty"])
def test_a_damaged_archive_is_told(tmp_path, packing, damage):
    whole = PACK[packing](("many words " * 2000).encode())
    contents = {
        "cut": whole[:-20],
        "changed": whole[: len(whole) // 2] + b"?" * 9 + whole[len(whole) // 2 + 9 :],
        "plain": b"plain words",
        "empty": b"",
    }
    path = tmp_path / f"text.txt{packing}"
    path.write_bytes(contents[damage])
    if damage == "empty" and packing == ".gz":  # gzip takes an empty file for an empty text
        assert read(path) == []
        return
    with pytest.raises(UserError, match=rf"text\.txt{packing}: (cannot be read|not UTF-8)"):
        read(path)


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("words")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("instructedit.tasks.texts.open", refuse, raising=False)
    with pytest.raises(UserError, match=r"text\.txt: cannot be read: Permission denied"):
        read(path)
