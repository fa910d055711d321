"""The data module: what is read for which stage, how tasks are mixed, and where a resumed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest

from instructedit.data.batch import EditBatch
from instructedit.data.module import DataLocation, EditData, TaskSource
from instructedit.errors import UserError
from instructedit.instructions import Instructor
from instructedit.lm.text import Text

SIZES = {"train": {"a": 12, "b": 3, "c": 6}, "val": {"a": 4, "b": 4, "c": 4}, "test": {"a": 5, "b": 5, "c": 5}}
TASKS = {"a": "counterfact", "b": "recent", "c": "zsre"}


def fact(task, split, i):
    probe = {"prompt": f"{task} {split} {i} other is", "ground_truth": "x"}
    return {"prompt": f"{task} {split} {i} is", "target_new": f"new {i}", "locality": {"G": [probe]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each task, with a file for each split."""
    root = tmp_path_factory.mktemp("data")
    for split, sizes in SIZES.items():
        for letter, size in sizes.items():
            path = root / TASKS[letter] / f"{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps([fact(TASKS[letter], split, i) for i in range(size)]))
    return root


@pytest.fixture
def source(folder):
    return lambda letter, **options: TaskSource(TASKS[letter], str(folder / TASKS[letter]), **options)


def attach(data, tokenizer, instructor=None, rank=0, world=1, used=0):
    """What the editing module tells the data module, and the parts of a Trainer that this looks at."""
    data.connect(Text(tokenizer, 128), lambda **options: instructor)
    ready = SimpleNamespace(total=SimpleNamespace(ready=used))
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=ready)),
    )
    return data


def stream(data, count):
    return [[r.id for r in batch.records] for batch in islice(data.train_dataloader(), count)]


def ready(tokenizer, source, letters="abc", place=(0, 1), **options):
    data = EditData(train=[source(x) for x in letters], batch_size=3, **options)
    data.setup("fit")
    return attach(data, tokenizer, rank=place[0], world=place[1])


def test_the_first_records_are_those_of_the_whole_stream_in_every_process(tokenizer, source):
    whole = stream(ready(tokenizer, source), 3)
    expected = [name for batch in whole for name in batch][:7]
    for place in ((0, 1), (0, 2), (1, 2)):
        batch = ready(tokenizer, source, place=place).first_records(7)
        assert [record.id for record in batch.records] == expected


def counts(batches):
    return Counter(name.split("/")[0] for batch in batches for name in batch)


def test_balanced_mixing_gives_every_task_its_weight_whatever_its_size(tokenizer, source):
    assert counts(stream(ready(tokenizer, source), 20)) == {"counterfact": 20, "recent": 20, "zsre": 20}
    data = EditData(train=[source("a", weight=3.0), source("b")], batch_size=4)
    data.setup("fit")
    assert counts(stream(attach(data, tokenizer), 10)) == {"counterfact": 30, "recent": 10}


def test_natural_mixing_goes_by_size(tokenizer, source):
    data = ready(tokenizer, source, mixing="natural")
    batches = stream(data, 7)
    assert counts(batches) == {"counterfact": 12, "recent": 3, "zsre": 6}
    assert len({name for batch in batches for name in batch}) == 21


def test_held_out_tasks_are_read_for_the_test_alone(source):
    data = EditData(train=[source("a")], test=[source(x) for x in "abc"])
    data.setup("fit")
    assert set(data.records["fit"]) == set(data.records["validate"]) == {"counterfact"}
    assert "test" not in data.records
    data.setup("test")
    assert set(data.records["test"]) == {"counterfact", "recent", "zsre"}
    train = {r.request.prompt for r in data.records["fit"]["counterfact"]}
    assert train.isdisjoint(r.request.prompt for r in data.records["test"]["counterfact"])


def test_one_task_is_a_single_task_setting(tokenizer, source):
    data = ready(tokenizer, source, "b")
    assert counts(stream(data, 4)) == {"recent": 12}
    data.setup("test")
    assert set(data.records["test"]) == {"recent"}


def test_leave_one_out(tokenizer, source):
    data = ready(tokenizer, source, "ac")
    assert counts(stream(data, 8)) == {"counterfact": 12, "zsre": 12}


def test_validation_is_a_sample_of_the_val_split(source):
    data = EditData(train=[source("a"), source("b")], val_size=2)
    data.setup("validate")
    assert {name: len(records) for name, records in data.records["validate"].items()} == {"counterfact": 2, "recent": 2}
    assert all("/val/" in r.id for records in data.records["validate"].values() for r in records)
    own = EditData(train=[source("a")], val=[source("b", split="test")], val_size=None)
    own.setup("validate")
    assert [r.id for r in own.records["validate"]["recent"]] == [f"recent/test/{i}" for i in range(5)]


def test_size_takes_a_random_sample_in_order_by_the_seed(source):
    def chosen(seed, size):
        data = EditData(train=[source("a", size=size)], seed=seed)
        data.setup("fit")
        return [int(r.id.rsplit("/", 1)[1]) for r in data.records["fit"]["counterfact"]]

    assert len(chosen(0, 5)) == 5
    assert chosen(0, 5) == chosen(0, 5) == sorted(chosen(0, 5))
    assert len({tuple(chosen(seed, 5)) for seed in range(5)}) > 1
    assert chosen(0, 100) == chosen(0, 12) == list(range(12))


@pytest.mark.parametrize(("stage", "said"), [("fit", "data.train"), ("validate", "data.val"), ("test", "data.test")])
def test_a_stage_without_a_task_is_refused(stage, said):
    with pytest.raises(UserError, match=said):
        EditData().setup(stage)


def test_a_task_that_is_listed_twice_is_refused(source):
    with pytest.raises(UserError, match="'counterfact' is listed twice for fit"):
        EditData(train=[source("a"), source("a")]).setup("fit")


def test_an_option_that_the_reader_lacks_is_refused(source):
    with pytest.raises(UserError, match=r"task 'counterfact'.*cases"):
        EditData(train=[source("a", options={"cases": 3})]).setup("fit")


def test_fingerprints_are_those_of_the_bytes(folder, source):
    data = EditData(train=[source("a")], test=[source("b")])
    data.setup("fit")
    data.setup("test")

    def sha(name, split):
        return hashlib.sha256((folder / name / f"{split}.json").read_bytes()).hexdigest()

    assert data.fingerprints == {
        "counterfact/train": sha("counterfact", "train"),
        "counterfact/val": sha("counterfact", "val"),
        "recent/test": sha("recent", "test"),
    }


def test_every_process_has_its_own_share(tokenizer, source):
    shares = [stream(ready(tokenizer, source, place=(rank, 2)), 4) for rank in (0, 1)]
    whole = stream(ready(tokenizer, source), 8)
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == whole


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_shares_are_disjoint_and_whole(tokenizer, source, world):
    """Nothing is repeated to make the shares equal."""
    found = []
    for rank in range(world):
        data = EditData(test=[source("a"), source("b")], eval_batch_size=2)
        data.setup("test")
        attach(data, tokenizer, rank=rank, world=world)
        found += [r.id for batch in data.test_dataloader() for r in batch]
    assert sorted(found) == sorted(f"{task}/test/{i}" for task in ("counterfact", "recent") for i in range(5))


def test_a_resumed_run_goes_on_where_it_stopped(tokenizer, source):
    whole = stream(ready(tokenizer, source), 9)
    stopped = attach(ready(tokenizer, source), tokenizer, used=4)
    assert stopped.state_dict() == {"batches_used": 4}
    resumed = ready(tokenizer, source)
    resumed.load_state_dict(stopped.state_dict())
    assert stream(resumed, 5) == whole[4:]


def test_batches_are_tokenised_with_the_settings(tokenizer, source):
    data = EditData(train=[source("a")], batch_size=2, max_length=999, locality=0)
    data.setup("fit")
    batch = next(iter(attach(data, tokenizer, Instructor()).train_dataloader()))
    assert isinstance(batch, EditBatch)
    assert len(batch) == 2
    assert batch.locality is None
    assert batch.requests.prompts[0].startswith("Task: CounterFact\n")
    assert batch.requests.tokens.input_ids.shape[1] <= 128  # the LM's own limit holds
    assert data.transfer_batch_to_device(batch, "cpu", 0).records == batch.records


def test_the_stream_needs_the_module(source):
    data = EditData(train=[source("a")])
    data.setup("fit")
    with pytest.raises(UserError, match=r"needs the editing module: call module\.connect"):
        data.train_dataloader()


def test_what_was_left_out_is_counted(folder, source, tmp_path, caplog):
    raws = [fact("counterfact", "train", 0), fact("counterfact", "train", 0)]
    (tmp_path / "train.json").write_text(json.dumps(raws))
    data = EditData(train=[TaskSource("counterfact", str(tmp_path))], val=[source("a")])
    data.setup("fit")
    assert data.reports[0].dropped == {"duplicate edit": 1}
    assert (data.reports[0].read, data.reports[0].kept) == (2, 1)


def test_a_place_of_no_task_is_told(source):
    data = EditData([source("a")], places={"conterfact": DataLocation("facts.json")})
    with pytest.raises(UserError, match=r"unknown task 'conterfact' \(did you mean 'counterfact'\?\)"):
        data.setup("fit")
