"""``instructedit cache``: what it computes, lists, removes and refuses, and that `fit` finds all it asks for."""

import json
import re

import pytest
import torch
import yaml

from instructedit.cli import main
from instructedit.lightning_cli import run
from instructedit.lm.cache import partition
from instructedit.lm.cache.folder import META, SHARD, partitions
from instructedit.testbed.pretrain import Recipe, new_model

DATA = "[{name: counterfact, size: 3}, {name: convsent, size: 2, options: {cases: 2}}]"
WARMED = re.compile(r"(\d+) rows of (\d+) tokens computed, ([\d.]+) MB written; (\d+) rows were there")
WIDTH = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("warm")
    for name, seed in (("lm", 0), ("other", 1)):
        recipe = Recipe(architecture="gpt2", width=WIDTH, layers=4, heads=2, vocab=600, context=256, seed=seed)
        new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    config = {
        "model": {
            "lm": {"name": str(root / "lm")},
            "editor": {
                "class_path": "InstructEdit", "init_args": {"rank": 3, "instructions": True, "blocks": [-2, -1]}
            },
        },
        "data": {"train": yaml.safe_load(DATA), "val": [{"name": "counterfact", "size": 1}], "batch_size": 2},
        "trainer": {
            "accelerator": "cpu", "max_steps": 12, "limit_val_batches": 0, "enable_progress_bar": False,
            "enable_model_summary": False, "logger": {"class_path": "instructedit.tracking.MLflowTracker",
            "init_args": {"root": str(root / "store")}},
        },
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


@pytest.fixture
def said(capsys):
    def ask(*options, status=0):
        capsys.readouterr()
        found = main(["cache", *options])
        out, err = capsys.readouterr()
        assert found == status, err
        return out if status == 0 else err

    return ask


def warmed(text):
    """Rows computed, their tokens, rows that were there."""
    rows, tokens, _, there = WARMED.search(text).groups()
    return int(rows), int(tokens), int(there)


def warm(place, *overrides):
    return [
        "warm",
        f"--configs=[{place}/config.yaml]",
        *([f"--overrides={json.dumps(overrides)}"] if overrides else []),
    ]


def test_fit_finds_all_that_it_asks_for(place, said, store):
    text = said(*warm(place))
    rows, tokens, there = warmed(text)
    assert there == 0
    assert f"--model.lm.cache_dir={store}" in text
    found = {one.meta["block"]: one for one in partitions(store)}
    assert sorted(found) == [2, 4]  # the first edited block, and what leaves the last
    assert 0 < found[4].rows < found[2].rows == rows - found[4].rows
    assert tokens * WIDTH * 4 < sum(one.bytes for one in found.values()) < 2 * tokens * WIDTH * 4
    assert {one.meta["hidden"] for one in found.values()} == {WIDTH}
    cli = run(["fit", f"--config={place}/config.yaml", f"--model.lm.cache_dir={store}"])
    cache = cli.model.lm.cache
    assert cli.trainer.global_step == 12
    assert cache.misses == 0
    assert 12 < cache.from_disk <= rows
    cold = run(["fit", f"--config={place}/config.yaml"])
    assert cold.model.lm.cache.misses == cache.from_disk  # and it asked for as many
    for name, weight in cli.model.editor.state_dict().items():
        torch.testing.assert_close(weight, cold.model.editor.state_dict()[name], atol=1e-5, rtol=1e-3)


def test_the_second_warming_computes_nothing_and_a_cut_one_goes_on(place, said, store):
    rows, _, _ = warmed(said(*warm(place)))
    before = sorted(store.rglob(f"*{SHARD}"))
    assert warmed(said(*warm(place))) == (0, 0, rows)
    assert sorted(store.rglob(f"*{SHARD}")) == before
    fewer, _, _ = warmed(said(*warm(place, "--data.train=[{name: counterfact, size: 3}]"), f"--cache_dir={store}/../b"))
    assert 0 < fewer < rows
    more, _, there = warmed(said(*warm(place, f"--model.lm.cache_dir={store}/../b")))
    assert (more, there) == (rows - fewer, fewer)


def test_a_scale_stands_for_its_configs(place, said):
    rows, _, _ = warmed(said(*warm(place)))
    (place / "scale.yaml").write_text("lm: config.yaml\ntrainer: config.yaml\ndata: []\n")
    assert warmed(said("warm", f"--scale={place}/scale.yaml")) == (0, 0, rows)


def test_editors_without_instructions_need_fewer_rows(place, said):
    instructed, _, _ = warmed(said(*warm(place)))
    plain, _, _ = warmed(said(*warm(place, "--model.editor.instructions=false", "--data.locality=0")))
    assert 0 < plain < instructed / 5


def test_an_editor_of_the_first_block_has_only_what_leaves_the_last(place, said, store):
    rows, _, _ = warmed(said(*warm(place, "--model.editor.blocks=[0]")))
    assert [(one.meta["block"], one.rows) for one in partitions(store)] == [(4, rows)]


def test_warming_says_what_the_bound_throws_out(place, said, store):
    text = said(*warm(place, "--model.lm.cache_disk_bytes=100000"))
    assert re.search(r"[\d.]+ MB were thrown out to keep to cache_disk_bytes = 0\.1 MB", text)
    assert sum(one.bytes for one in partitions(store)) <= 100_000


def test_warming_in_half_the_size(place, said, store):
    rows, _, _ = warmed(said(*warm(place, "--model.lm.cache_dtype=bfloat16")))
    found = partitions(store)
    assert {(one.meta["dtype"], one.meta["bytes_per_token"]) for one in found} == {("bfloat16", 2 * WIDTH)}
    assert sum(one.rows for one in found) == rows


def test_list_shows_models_blocks_rows_and_sizes(place, said, store):
    assert "0.0 MB in all" in said("list")
    plain = "--data.locality=0"
    rows, _, _ = warmed(said(*warm(place, plain)))
    said(*warm(place, plain, f"--model.lm.name={place}/other", "--model.editor.blocks=[3]"))
    text = said("list")
    assert len(re.findall(rf"│ +{rows} +│", text)) == 2
    assert all(f"│ {block} " in text for block in (2, 3))
    size = sum(file.stat().st_size for file in store.rglob(f"*{SHARD}"))
    assert f"{store}: {size / 1e6:.1f} MB in all" in text
    assert "corrupt" not in text
    next(store.rglob(f"*{SHARD}")).write_bytes(b"no")
    assert "1 corrupt shards" in said("list")


def test_clear_removes_one_model_or_all(place, said, store):
    rows, _, _ = warmed(said(*warm(place)))
    said(*warm(place, f"--model.lm.name={place}/other"))
    assert f"{rows} rows removed" in said("clear", f"--lm={place}/lm")
    assert [one.meta["lm"] for one in partitions(store)] == [f"{place}/other"] * 2
    error = said("clear", f"--lm={place}/lm", status=2)
    assert f"{place}/other" in error
    size = sum(one.bytes for one in partitions(store))
    assert f"{rows} rows removed, {size / 1e6:.1f} MB freed" in said("clear")
    assert list(store.iterdir()) == []
    assert "0 rows removed" in said("clear")


@pytest.mark.parametrize("where", [".", "partition"])
def test_clear_refuses_a_folder_with_anything_else_in_it(place, said, store, where):
    said(*warm(place))
    folder = next(store.iterdir()) if where == "partition" else store
    (folder / "thesis.tex").write_text("mine")
    before = sorted(store.rglob("*"))
    error = said("clear", status=2)
    assert "thesis.tex" in error
    assert sorted(store.rglob("*")) == before


def test_clear_follows_no_links(place, said, store, tmp_path):
    said(*warm(place))
    elsewhere = tmp_path / "elsewhere"
    next(store.iterdir()).rename(elsewhere)
    (store / ("0" * 32)).symlink_to(elsewhere)
    assert "no part of a prefix cache" in said("clear", status=2)
    assert (elsewhere / META).is_file()


def test_what_cannot_be_warmed_is_one_line(place, said, tmp_path, monkeypatch):
    assert "no such file" in said("warm", f"--configs=[{tmp_path}/none.yaml]", status=2)
    assert "batch_size must be at least 1, got 0" in said(*warm(place), "--batch_size=0", status=2)
    assert "cache_dir is null" in said(*warm(place, "--model.lm.cache_dir=null"), status=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(partition.Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert "took no more" in said(*warm(place), status=2)


def test_parts_of_the_rows_are_computed_by_several_processes(said, place):
    parts = [warmed(said(*warm(place), f"--shard={part}/3")) for part in (2, 1, 3)]
    rows, _, there = warmed(said(*warm(place)))
    assert rows == 0
    assert there == sum(part[0] + part[2] for part in parts)
    assert min(part[0] for part in parts) > 0
    for wrong in ("0/2", "3/2", "2", "a/b", "1/-1"):
        assert f"--shard '{wrong}': expected a part" in said("warm", f"--shard={wrong}", status=2)
