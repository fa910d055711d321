"""What is timed against each other computes the same; and the command says what it measured."""

import contextlib
import io
import json
import math
import os
import subprocess
from dataclasses import replace

import pytest
import torch
from tests.reference import relative

from instructedit.benchmark import bench as benches
from instructedit.benchmark import measure as measures
from instructedit.benchmark import memory
from instructedit.benchmark.bench import WEIGHTS, Bench, LowMemory, Setting, Shape
from instructedit.benchmark.measure import MEASURES, many_edits, measure
from instructedit.benchmark.memory import in_own_process, monitored_memory, peak_memory
from instructedit.benchmark.roofline import Rates, counted
from instructedit.cli import main
from instructedit.errors import UserError
from instructedit.evaluation import Evaluation, evaluate_batch

SETTING = Setting("small", rank=8, edits=4, fluency_tokens=4, threads=1)


@pytest.fixture(params=["gpt2", "llama", "instructed"])
def bench(request, monkeypatch):
    instructed = request.param == "instructed"
    monkeypatch.setitem(benches.SHAPES, "small", Shape("gpt2" if instructed else request.param, 4, 32, 2, 4096))
    bench = Bench(replace(SETTING, instructions=instructed))
    bench.editor.start_at(0.05)
    rng = torch.Generator().manual_seed(0)
    for network in bench.editor.networks:
        for up in network.up:
            up.data = torch.randn(up.shape, generator=rng) * 0.01
    return bench


def gradients(bench):
    found = [p.grad.clone() for p in bench.editor.parameters()]
    bench.editor.zero_grad()
    return found


def test_instructions_stand_in_front_of_all_that_is_in_scope(bench):
    records = [*bench.records, *bench.tested]
    asked = [p for r in records for p in (r.reliability, *r.probes)]
    prompts = [p.prompt for p in asked if p.kind != "locality"]
    assert {prompt.startswith("Task: ") for prompt in prompts} == {bench.setting.instructions}
    assert not any(p.prompt.startswith("Task: ") for p in asked if p.kind == "locality")


def test_both_train_on_the_same_loss(bench):
    bench.editor.eval()  # the statistics stand still, which the two gather in different order
    fast = bench.editor.training_loss(bench.batches[0], WEIGHTS)["loss"]
    fast.backward()
    expected = gradients(bench)
    losses = [bench.plain.loss(record, WEIGHTS) for record in bench.records]
    torch.stack(losses).mean().backward()
    assert torch.stack(losses).mean().item() == pytest.approx(fast.item(), rel=1e-4)
    for found, wanted in zip(gradients(bench), expected, strict=True):
        assert wanted.abs().max() > 0
        assert relative(found, wanted) < 1e-3


def test_both_give_every_probe_the_same_scores(bench):
    settings = Evaluation(generate=False, fluency_tokens=0, replies=99)
    rows = evaluate_batch(bench.lm, bench.editor, bench.tested, settings).rows
    for record in bench.tested:
        best = {}
        for row in bench.plain.scores(record, 4):
            if "accuracy" in row:
                best.setdefault(round(row["log_likelihood"], 3), row)
        for row in (r for r in rows if r["record"] == record.id):
            assert any(abs(row["log_likelihood"] - plain["log_likelihood"]) < 1e-3 for plain in best.values())
    assert rows


def test_beside_an_lm_in_half_precision_the_hypernetwork_multiplies_in_it_too(bench, monkeypatch):
    under = []
    for shape, kind in (("small", "float32"), ("half", "bfloat16")):
        monkeypatch.setitem(benches.SHAPES, shape, replace(benches.SHAPES["small"], dtype=kind))
        one = Bench(replace(bench.setting, shape=shape))
        for network in one.editor.networks:
            network.register_forward_hook(lambda *_: under.append(torch.is_autocast_enabled("cpu")))
        for variant in ("plain", "warm"):
            under.clear()
            one.run("train", variant)
            assert set(under) == {kind == "bfloat16"}
        one.run("evaluate", "plain")


def test_the_plain_model_is_left_as_it_was(bench):
    before = {name: tensor.clone() for name, tensor in bench.plain.model.state_dict().items()}
    bench.evaluate_plain()
    bench.train_plain()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.plain.model.state_dict().items())


def test_an_interrupted_edit_leaves_the_plain_model_as_it_was(bench):
    record = bench.records[0]
    before = {name: layer.weight.detach().clone() for name, layer in bench.plain.layers.items()}
    deltas = {k: d.detach() for k, d in bench.plain.deltas(record.request.prompt, record.request.target).items()}
    with pytest.raises(KeyboardInterrupt), bench.plain.installed(deltas):
        raise KeyboardInterrupt
    for name, layer in bench.plain.layers.items():
        assert torch.equal(layer.weight, before[name])


def test_measures_count_what_they_time(bench, monkeypatch):
    monkeypatch.setattr(measures, "peak_memory", lambda *_: 1.0)  # its processes know no shape of ours
    monkeypatch.setattr(measures, "machine_rates", lambda _: Rates(1e9, 1e9, 1e9))
    rows = {(r["measure"], r["variant"]): r for r in measure(SETTING, repeats=2)}
    assert len(rows) == 11
    assert all(row["rate"] > 0 and len(row["seconds"]) == 2 for row in rows.values())
    assert rows["train", "warm"]["gflop"] < rows["train", "cold"]["gflop"] < rows["train", "plain"]["gflop"]
    assert rows["train", "plain"]["gbyte"] == pytest.approx(2 * rows["train", "warm"]["gbyte"])
    assert all(rows[name, "plain"]["ratio"] == 1 for name in MEASURES)


def test_the_variants_differ_in_how_much_they_do_at_once(bench, monkeypatch):
    at_once = []
    monkeypatch.setattr(bench, "low_memory", LowMemory(2, 3, 440))
    monkeypatch.setattr(
        benches, "evaluate_batch", lambda lm, editor, records, settings: at_once.append((len(records), settings.tokens))
    )
    bench.evaluate_warm()
    bench.evaluate_lean()
    assert at_once == [(4, 8192), (3, 440), (1, 440)]
    assert [len(batch) for batch in bench.batches] == [4]
    assert [len(batch) for batch in bench.small] == [3, 1]
    bench.evaluate_cold()
    assert len(bench.lm.cache) == 0


def test_only_the_measured_process_gives_memory_back_at_once(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "7")
    ask = ["python3", "-c", "import os; print(os.environ['MALLOC_MMAP_THRESHOLD_'])"]
    with memory._returned():
        within = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    after = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert (int(within), int(after)) == (32 << 10, 7)


def test_what_a_process_of_its_own_finds_comes_back_and_its_failure_is_said():
    assert in_own_process(os.getpid) != os.getpid()
    assert in_own_process(os.getenv, "MALLOC_MMAP_THRESHOLD_") == str(32 << 10)
    with pytest.raises(RuntimeError, match="the process of _exit ended with exit code 3"):
        in_own_process(os._exit, 3)


def test_a_failed_process_costs_the_memory_alone():
    with pytest.warns(UserWarning, match="no peak memory of train plain: the process of _peak ended with exit code 1"):
        assert math.isnan(peak_memory(replace(SETTING, shape="huge"), "train", "plain"))


def test_many_edits_are_counted(bench, monkeypatch):
    monkeypatch.setattr(measures, "in_own_process", lambda function, *args: function(*args))
    made, engine = [], measures.evaluate_batch

    def counted(lm, editor, records, settings):
        made.append(len({row["record"] for row in engine(lm, editor, records, settings).rows}))

    monkeypatch.setattr(measures, "evaluate_batch", counted)
    monkeypatch.setattr(measures, "SETTLED", 5)
    rows = many_edits(replace(SETTING, batch=4), (3, 9))
    assert [row["edits"] for row in rows] == [3, 9]
    assert made == [4, 1, 3, 4, 1, 4, 4, 1]  # five edits that are not counted come before
    assert all(row["ms_per_edit"] > 0 for row in rows)


def test_a_product_counts_its_flops_and_the_bytes_that_no_cache_holds():
    x, small, large, out = torch.ones(2, 1024), torch.ones(1024, 8), torch.ones(1024, 2048), torch.ones(2048)
    rates = Rates(flops=1e9, read=1e9, copy=1.0)
    for run, flops, moved in (
        (lambda: x @ small, 2 * 2 * 1024 * 8, 0),
        (lambda: torch.addmm(out, x, large), 2 * 2 * 1024 * 2048, 1024 * 2048 * 4),
        (lambda: torch.bmm(x[None], large[None]), 2 * 2 * 1024 * 2048, 1024 * 2048 * 4),
        (lambda: x + 1, 0, 0),
    ):
        work = counted(run, rates)
        assert (work.flops, work.bytes) == (flops, moved)
        assert work.seconds == max(flops, moved) / 1e9
    both = counted(lambda: (x @ small, x @ large), rates)
    assert both.seconds == pytest.approx((2 * 2 * 1024 * 8 + 1024 * 2048 * 4) / 1e9)  # one after the other


def held_for_a_moment(megabytes):
    with monitored_memory(SETTING) as peak:
        held = torch.ones(megabytes * 250_000)
        del held
    return peak()


def test_memory_is_seen_at_its_peak_and_no_more():
    # In a process of its own: in this one, what other tests leave may be given back meanwhile.
    assert 30 < in_own_process(held_for_a_moment, 40) < 100  # 40 MB, and what else the process does


def test_the_command_writes_its_figures(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(measures, "peak_memory", lambda *_: 1.0)
    options = ["--shapes=[small]", "--rank=4", "--edits=4", "--batch=3", "--tokens=200", "--measures=[train]"]
    options += ["--repeats=1", "--fluency_tokens=3", "--threads=1"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert (
            main(
                [
                    "benchmark",
                    *options,
                    "--batch=3",
                    "--tokens=200",
                    "--measures=[train]",
                    f"--json={tmp_path}/figures.json",
                ]
            )
            == 0
        )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["variant"] for row in figures["rows"]} == {"plain", "cold", "warm", "lean"}
    assert figures["setting"]["edits"] == 4
    assert {row["measure"] for row in figures["rows"]} == {"train"}
    assert "platform" in figures["machine"]
    assert "× plain" in printed.getvalue()


@pytest.mark.parametrize("option", ["repeats", "edits", "rank", "batch", "tokens", "threads"])
def test_what_cannot_be_counted_is_one_line(option, capsys):
    assert main(["benchmark", "--shapes", "6x256", f"--{option}=0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_a_shape_that_is_none_and_a_model_that_is_none(capsys):
    assert main(["benchmark", "--shapes=[huge]"]) == 2
    assert "no shape 'huge'; there are: 6x256" in capsys.readouterr().err
    with pytest.raises(UserError, match="no model 'huge'"):
        measure(Setting("huge"))


def test_a_real_model_is_measured_by_its_name(monkeypatch):
    monkeypatch.setattr(measures, "peak_memory", lambda *_: 1.0)
    monkeypatch.setattr(measures, "machine_rates", lambda _: Rates(1e9, 1e9, 1e9))
    rows = measure(Setting("tiny", rank=8, edits=2, fluency_tokens=2, threads=1), 1, ["train", "one"])
    assert {row["shape"] for row in rows} == {"tiny"}
    assert all(row["rate"] > 0 for row in rows)
