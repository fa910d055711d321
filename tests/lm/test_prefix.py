"""The prefix cache: the states of a plain forward pass, whatever is in memory, on disk, or thrown out."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.conftest import random_lm
from tests.lm.prefixes import FORWARD, HIDDEN, ROWS, TOKENS, asked, equal, filled, opened, plain, shards

from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.lm.cache import partition
from instructedit.lm.cache.folder import clear, evict, partition_name, partitions
from instructedit.lm.cache.memory import PrefixCache
from instructedit.lm.cache.shard import STORAGE_DTYPES, row_key
from instructedit.lm.fingerprint import checksum
from instructedit.lm.tokens import rows_of

# -- the same states, from wherever --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
def test_states_from_disk_are_exactly_the_computed_ones(lm, tmp_path, block):
    first = filled(lm, tmp_path, block=block)
    for found, expected in zip(first, plain(lm, ROWS, block), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert equal(first, asked(lm, block=block))  # of an LM without a disk
    again = opened(lm, tmp_path)
    again.model.forward = None  # nothing can be computed
    assert equal(asked(again, block=block), first)
    assert (again.cache.misses, again.cache.hits, again.cache.from_disk) == (0, 4, 4)
    assert equal(asked(again, block=block), first)
    assert again.cache.from_disk == 4  # memory stands in front


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounded_states_do_not_depend_on_what_was_there(lm, tmp_path, name):
    exact, dtype = asked(lm), getattr(torch, name)
    first = filled(lm, tmp_path, cache_dtype=name)
    assert equal(first, [row.to(dtype).float() for row in exact])
    assert not equal(first, exact)
    for options in ({}, {"cache_bytes": 0}):
        again = opened(lm, tmp_path, cache_dtype=name, **options)
        for _ in range(2):
            found = asked(again)
            assert equal(found, first)
            assert {row.dtype for row in found} == {torch.float32}
        assert again.cache.misses == 0
    (file,) = shards(tmp_path)
    assert load_file(file)["states"].dtype is dtype
    assert load_file(file)["states"].shape == (TOKENS, HIDDEN)


def test_states_that_do_not_fit_in_float16_are_refused(lm, tmp_path):
    lm.model.get_input_embeddings().weight.data *= 1e6
    with pytest.raises(UserError, match="bfloat16"):
        asked(opened(lm, tmp_path, cache_dtype="float16"), block=1)
    asked(opened(lm, tmp_path, cache_dtype="bfloat16"), block=1)


def test_a_model_in_bfloat16_keeps_its_own_dtype_exactly(tokenizer, tmp_path):
    lm = random_lm("gpt2", tokenizer, torch.bfloat16)
    first = filled(lm, tmp_path)
    assert equal(first, asked(lm))
    assert load_file(shards(tmp_path)[0])["states"].dtype is torch.bfloat16
    assert equal(asked(opened(lm, tmp_path)), first)


def test_a_pass_goes_on_from_a_stage_and_computes_the_same_bits(lm):
    once, staged = (FrozenLM(lm.model, lm.tokenizer, lm.name) for _ in range(2))
    ran = []
    inner = [next(block.children()) for block in once.forward.blocks]  # blocks that are skipped are called, too
    staged.prefixes.stages |= {1, 2}
    asked(staged, block=3)  # tries the model out, too
    staged.cache.clear()
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(inner)]
    found = {block: asked(staged, block=block) for block in (3, 2, 1)}
    for handle in handles:
        handle.remove()
    passes = ran.count(0)
    assert passes > 0
    assert [ran.count(block) for block in range(4)] == [passes] * 3 + [0]  # known since the first call
    for block, states in found.items():
        assert equal(states, asked(once, block=block))


def test_states_stream_from_disk_where_memory_has_no_room(lm, tmp_path):
    rows = [[i, i + 1, i + 2, i + 3] for i in range(40)]
    small = opened(lm, tmp_path, cache_bytes=5 * 4 * HIDDEN * 4)  # of five rows
    expected = [asked(lm, [row])[0] for row in rows]
    for turn in range(2):
        for row, states in zip(rows, expected, strict=True):
            assert torch.equal(asked(small, [row])[0], states)
        small.cache.flush()
        assert (len(small.cache), small.cache.misses, small.cache.from_disk) == (5, 40, 40 * turn)


def test_rows_that_wait_for_their_segment_are_known(lm, tmp_path):
    waiting = opened(lm, tmp_path, cache_bytes=0)
    first = asked(waiting)
    assert equal(asked(waiting), first)
    assert waiting.cache.misses == 4
    assert waiting.cache.on_disk(rows_of([*ROWS, [1, 2]]), 2) == [True, True, True, True, False]
    assert shards(tmp_path) == []


def test_what_waits_is_written_when_the_model_goes(lm, tmp_path):
    first = opened(lm, tmp_path)
    asked(first)
    del first
    import gc

    gc.collect()
    assert len(shards(tmp_path)) == 1


def test_many_rows_are_written_as_one_file_when_enough_wait(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "SHARD_BYTES", 10 * HIDDEN * 4)
    writer = opened(lm, tmp_path)
    for i in range(20):
        asked(writer, [[i, i]])
    assert [len(load_file(file)["ends"]) for file in shards(tmp_path)] == [5, 5, 5, 5]
    monkeypatch.setattr(partition, "SHARD_SECONDS", 0.0)  # or when they have waited long enough
    asked(writer, [[7, 7, 7]])
    assert len(shards(tmp_path)) == 5


def test_block_zero_and_edited_passes_are_not_written(lm, tmp_path):
    cached = opened(lm, tmp_path)
    asked(cached, block=0)
    cached.applied.blocks.append(0)
    asked(cached)
    cached.cache.flush()
    assert shards(tmp_path) == []


# -- whose states --------------------------------------------------------------------------------------------------

PARTS = {
    "model": st.text(max_size=8), "block": st.integers(0, 99), "forward": st.text(max_size=8),
    "at_rest": st.sampled_from(sorted(STORAGE_DTYPES)),
}  # fmt: skip
TOKEN_ROWS = st.lists(st.integers(0, 2**31), min_size=1, max_size=6).map(
    lambda ids: torch.tensor(ids).numpy().tobytes()
)


@given(st.fixed_dictionaries(PARTS), st.fixed_dictionaries(PARTS), TOKEN_ROWS, TOKEN_ROWS)
def test_keys_never_collide(one, other, tokens, more):
    assert (partition_name(one) == partition_name(other)) == (one == other)
    assert (row_key(tokens) == row_key(more)) == (tokens == more)
    for name in PARTS:  # and each part alone matters
        assert partition_name(one | {name: other[name]}) == partition_name(one) or one[name] != other[name]
        assert (partition_name(one | {name: other[name]}) != partition_name(one)) == (one[name] != other[name])


@given(st.data())
def test_one_bit_of_any_weight_is_another_model(data):
    weights = {"a": torch.arange(21, dtype=torch.float32).reshape(3, 7), "b": torch.ones(5, dtype=torch.bfloat16)}
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    name = data.draw(st.sampled_from(sorted(weights)))
    raw = changed[name].flatten().view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(changed) != checksum(weights)
    assert checksum(dict(reversed(weights.items()))) == checksum(weights)


@pytest.mark.parametrize("part", ["weight", "dtype", "block", "rounding", "precision"])
def test_nothing_of_another_model_or_pass_is_used(tokenizer, tmp_path, monkeypatch, part):
    lm = random_lm("gpt2", tokenizer)
    filled(lm, tmp_path)
    options, block = {}, 2
    if part == "weight":  # one element, where the fingerprint's sample does not look
        lm = random_lm("gpt2", tokenizer)
        table = lm.model.get_input_embeddings().weight
        stride = table.numel() // 1024
        assert stride > 1
        fingerprint = opened(lm, tmp_path).fingerprint
        table.data.view(-1)[ROWS[0][0] * HIDDEN + (1 if (ROWS[0][0] * HIDDEN + 1) % stride else 2)] += 1.0
        assert opened(lm, tmp_path).fingerprint == fingerprint
    elif part == "dtype":
        lm = random_lm("gpt2", tokenizer, torch.bfloat16)
    elif part == "block":
        block = 3
    elif part == "rounding":
        options = {"cache_dtype": "bfloat16"}
    elif part == "precision":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    other = opened(lm, tmp_path, **options)
    found, expected = asked(other, block=block), asked(lm, block=block)
    assert (other.cache.misses, other.cache.from_disk) == (4, 0)
    if part != "rounding":
        assert equal(found, expected)
    other.cache.flush()
    assert len(list(tmp_path.iterdir())) == 2  # a partition of its own


@pytest.mark.parametrize("first", [True, False])
def test_a_trainers_autocast_changes_no_states(lm, tmp_path, first):
    exact = asked(lm)
    for mixed in (first, not first):
        cached = opened(lm, tmp_path)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            assert equal(asked(cached), exact)
        cached.cache.flush()
    assert cached.cache.misses == 0


def test_a_shard_in_another_models_partition_is_dropped(lm, tokenizer, tmp_path):
    filled(lm, tmp_path)
    other = random_lm("gpt2", tokenizer, seed=5)
    filled(other, tmp_path)
    mine, theirs = (one for one in sorted(tmp_path.iterdir()))
    for file in shards(mine):
        file.rename(theirs / file.name)
    homes = {
        partition_name(opened(model, tmp_path).cache.disk.partition(FORWARD, 2)._about): model for model in (lm, other)
    }
    with pytest.warns(UserWarning, match="checksum"):
        found = asked(opened(homes[theirs.name], tmp_path))
    assert equal(found, asked(homes[theirs.name]))


# -- the bound -----------------------------------------------------------------------------------------------------


def test_the_bound_holds_and_the_least_lately_used_go_first(lm, tmp_path):
    sizes = []
    bound = 40_000
    writer = opened(lm, tmp_path, cache_disk_bytes=bound, cache_bytes=0)
    for i in range(60):
        states = asked(writer, [[i, i, i, i, i, i, i, i]])[0]
        assert torch.equal(states, asked(lm, [[i, i, i, i, i, i, i, i]])[0])
        sizes.append(sum(file.stat().st_size for file in shards(tmp_path)))
    assert max(sizes) <= bound
    assert sizes[-1] > bound / 2  # nor is it emptied
    assert writer.cache.disk.evicted > 0
    assert not opened(lm, tmp_path).cache.on_disk(rows_of([[0] * 8]), 2)[0]
    assert opened(lm, tmp_path).cache.on_disk(rows_of([[50] * 8]), 2)[0]


def test_use_keeps_a_segment(lm, tmp_path):
    for number, row in enumerate(ROWS):
        filled(lm, tmp_path, [row])
        newest = max(shards(tmp_path), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (1000 + number, 1000 + number))
    asked(opened(lm, tmp_path), ROWS[:1])
    evict(tmp_path, sum(file.stat().st_size for file in shards(tmp_path)) - 1)
    assert opened(lm, tmp_path).cache.on_disk(rows_of(ROWS), 2) == [True, False, True, True]


def test_a_reader_goes_on_with_what_was_thrown_out(lm, tmp_path):
    first = filled(lm, tmp_path)
    reader = opened(lm, tmp_path, cache_bytes=0)
    assert reader.cache.on_disk(rows_of(ROWS), 2) == [True] * 4
    evict(tmp_path, 0)
    assert shards(tmp_path) == []
    assert equal(asked(reader), first)  # mapped still
    assert reader.cache.misses == 0
    asked(reader, [[9, 9]])  # a miss: now it sees that the file is gone
    assert reader.cache.on_disk(rows_of(ROWS), 2) == [False] * 4
    assert equal(asked(reader), first)


def test_another_process_may_clear_the_folder_meanwhile(lm, tmp_path):
    writer = opened(lm, tmp_path)
    asked(writer, ROWS[:2])
    writer.cache.flush()
    assert sum(one.rows for one in clear(tmp_path)) == 2
    asked(writer, ROWS[2:])
    writer.cache.flush()
    assert [one.rows for one in partitions(tmp_path)] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cache_dtype": "int8"}, "cache_dtype"), ({"cache_disk_bytes": 0}, "cache_disk_bytes"), ({}, "not a folder")],
)
def test_wrong_options_are_one_line(lm, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        opened(lm, tmp_path / ("x" if options else "file"), **options)


@given(
    asked=st.lists(st.lists(st.integers(0, 6), max_size=5), max_size=6), room=st.integers(0, 40),
    as_tensors=st.booleans(),
)  # fmt: skip
def test_what_is_recalled_is_what_was_found_out(asked, room, as_tensors):
    cache, found = PrefixCache(room), []

    def value(key):
        return (torch.full((key,), float(key)), "x" * key) if as_tensors else "x" * key

    for keys in asked:

        def compute(rows, keys=keys):
            found.append([keys[i] for i in rows])
            return [value(keys[i]) for i in rows]

        values = cache.memoized("kind", keys, compute)
        assert [str(v) for v in values] == [str(value(key)) for key in keys]
        assert cache.bytes <= room
    assert all(len(set(keys)) == len(keys) > 0 for keys in found)
    if room == 40 and not as_tensors:  # room for all
        assert sum(map(len, found)) == len({key for keys in asked for key in keys})


def test_kinds_are_kept_apart_and_forgotten_with_the_states():
    cache = PrefixCache()
    for _ in range(2):
        assert cache.memoized("a", [1], lambda rows: ["one"]) == ["one"]
        assert cache.memoized("b", [1], lambda rows: ["other"]) == ["other"]
        assert cache.memoized("a", [1], lambda rows: ["new"]) == ["one"]
        cache.clear()
        assert cache.memoized("a", [1], lambda rows: ["new"]) == ["new"]
        cache.clear()


@pytest.mark.parametrize("room", [200, 500, 1000, 2000, 4000])
def test_what_is_known_survives_that_computing_the_rest_throws_it_out(tokenizer, room):
    lm, whole = random_lm("gpt2", tokenizer), random_lm("gpt2", tokenizer)
    lm.cache.max_bytes = room
    first = [("The capital of France is", "Lyon")]
    both = [*first, ("Who is", "the man of the sea"), ("Some other prompt", "and answer")]
    for pairs in (first, both, first, both):
        batch = lm.encode(pairs)
        found, expected = lm.scores.unedited_predictions(batch, 2), whole.scores.unedited_predictions(batch, 2)
        torch.testing.assert_close(found.nll, expected.nll, rtol=1e-4, atol=1e-5)
