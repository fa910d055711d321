"""`instructedit instructions optimize`: the planted description is found; keeping, stopping, resuming."""

from __future__ import annotations

import json
import random
import re

import pytest
from tests.writing.conftest import completion, failure

import instructedit as ie
from instructedit.cli import main
from instructedit.errors import UserError
from instructedit.instructions import Description, InstructionBank
from instructedit.records import EditRecord, EditRequest
from instructedit.tracking import artifact_path, runs
from instructedit.writing.card import TaskCard
from instructedit.writing.checks import Rules, Terms
from instructedit.writing.clients import Writer
from instructedit.writing.generate import write_bank
from instructedit.writing.ledger import Ledger
from instructedit.writing.optimize import Optimizer, Search
from instructedit.writing.trial import EditorTrial, Measured, Verdict, compared

RECORDS = [f"demo/val/{i}" for i in range(40)]
WORSE = ("Purple ladders sing under seven hills.", "Reply kindly whenever the weather comes up.")
GOOD = "Replace a stored fact with the one that is given."
NONSENSE = ("Blue kettles answer to no clock today.", "Nobody counts spoons in that quiet village.")
BANK = InstructionBank(
    "Demo",
    (
        Description("d-1", "train", WORSE[0]), Description("d-2", "train", WORSE[1]),
        Description("d-3", "heldout", "Kept out of everything that happens here."),
    ),
)  # fmt: skip
CARD = TaskCard("demo", "Demo", "Facts change.", (), ())


class Stub:
    """An editor that does better with the descriptions that it was trained with, record by record and with noise."""

    def __init__(self, worth=None):
        self.clusters = {record: record for record in RECORDS}
        self.identity = {"editor": "stub"}
        self.worth = worth or {GOOD: 0.85}
        self.measured: list[str] = []

    def measure(self, text):
        self.measured.append(text)
        rng = random.Random(text)
        level = self.worth.get(text, 0.5)
        values = {m: {r: min(1, max(0, rng.gauss(level, 0.2))) for r in RECORDS} for m in ("reliability", "locality")}
        return Measured(values, (f"reliability: 'Hm?' should give 'Ha' with {text[:6]}",))


def optimizer(server, folder, trial=None, ledger=None, rules=Rules(), bank=BANK, **search):  # noqa: B008
    ledger = ledger or Ledger.open(50, 100_000, folder / "work" / "ledger.json")
    writer = Writer.open("scripted", ledger, server.url, cache=folder / "cache", tries=1)
    search = Search(**{"patience": 2, **search})
    return Optimizer(CARD, bank, writer, rules, trial or Stub(), search, folder / "work", folder / "store")


def proposal(*pairs: tuple[str, str]) -> dict:
    return completion({"revisions": [{"id": name, "text": text} for name, text in pairs]})


def test_the_planted_description_is_found_and_the_search_stops_by_its_rule(server, tmp_path):
    server.script = [
        proposal(("d-1", NONSENSE[0]), ("d-2", GOOD)), proposal(("d-1", NONSENSE[1])),
        lambda request: proposal(("d-2", f"Not better, number {request['seed']} of many.")),
    ]  # fmt: skip
    search = optimizer(server, tmp_path)
    found = search.run()
    assert [(d.id, d.split, d.text) for d in found.descriptions] == [
        ("d-1", "train", WORSE[0]), ("d-2-r1", "train", GOOD), ("d-3", "heldout", BANK.get("d-3").text),
    ]  # fmt: skip
    assert search.state.stopped == "nothing improved for 2 rounds"
    assert [done["kept"] for done in search.state.rounds] == [0, 1, 0, 0]
    assert len(server.requests) == 3
    assert found.provenance.model == "scripted"
    write_bank(found, tmp_path / "bank.yaml")
    assert InstructionBank.load(tmp_path / "bank.yaml") == found


def test_the_writer_sees_figures_failures_and_what_was_not_kept(server, tmp_path):
    server.script = [proposal(("d-1", NONSENSE[0])), proposal(("d-1", NONSENSE[1]))]
    optimizer(server, tmp_path).run()
    first, second = server.asked
    assert re.search(rf"- d-1: '{re.escape(WORSE[0])}': reliability \d\d\.\d, locality \d\d\.\d", first)
    assert "Failures with d-" in first
    assert "reliability: 'Hm?' should give 'Ha'" in first
    assert NONSENSE[0] not in first
    assert re.search(rf"'{re.escape(NONSENSE[0])}' in place of d-1: score [+-]\d", second)


def test_every_round_is_a_run_under_one_with_a_figure(server, tmp_path):
    server.script = [proposal(("d-2", GOOD)), proposal(("d-1", NONSENSE[0])), proposal(("d-1", NONSENSE[1]))]
    search = optimizer(server, tmp_path)
    search.run()
    found = runs(root=tmp_path / "store").set_index("name")
    parent = found.loc["optimize/demo"]
    rounds = found[found["parent"] == parent.run_id].sort_index()
    assert list(rounds.index) == [f"optimize/demo/round-{i}" for i in range(4)]
    assert set(found["status"]) == {"FINISHED"}
    assert list(rounds["metrics.kept"]) == [0, 1, 0, 0]
    means = [row["mean"] for row in search.figures() if row["metric"] == "reliability"]
    assert list(rounds["metrics.val/reliability"]) == pytest.approx(means)
    assert means[1] > means[0] + 10
    trial = Stub()
    by_hand = [100 * sum(trial.measure(t).values["reliability"].values()) / 40 for t in WORSE]
    assert means[0] == pytest.approx(sum(by_hand) / 2)
    assert list(rounds["metrics.ledger/calls"]) == [0, 1, 2, 3]
    for file in (
        artifact_path(parent.run_id, "figures/metrics.png", tmp_path / "store"),
        tmp_path / "work/metrics.svg",
    ):
        assert file.stat().st_size > 1000


def test_a_revision_that_is_better_by_chance_alone_is_not_kept(server, tmp_path):
    """Higher in the mean, but not by the paired interval."""
    trial = Stub({GOOD: 0.5})
    a, b = (trial.measure(text).scores() for text in (GOOD, WORSE[1]))
    assert sum(a.values()) > sum(b.values())
    server.script = [proposal(("d-2", GOOD))]
    search = optimizer(server, tmp_path, trial, rounds=1)
    assert not search.improved
    assert search.run().get("d-2").text == WORSE[1]


def test_of_two_better_revisions_the_best_is_kept(server, tmp_path):
    best = "Overwrite what was known by something else."
    server.script = [proposal(("d-1", GOOD), ("d-1", best))]
    search = optimizer(server, tmp_path, Stub({GOOD: 0.75, best: 0.95}), rounds=1)
    assert search.run().get("d-1-r1").text == best
    assert search.state.stopped == "the rounds are over"


def test_compared_by_hand():
    old = Measured({"a": {"r": 0.2, "s": 0.4, "t": 0.3}, "b": {"r": 0.5, "s": 0.5}})
    new = Measured({"a": {"r": 0.4, "s": 0.6, "t": 0.6}, "b": {"r": 0.5, "s": 0.7}})
    clusters = {"r": "1", "s": "2", "t": "3"}
    verdict = compared(new, old, clusters)
    assert verdict.score == pytest.approx(100 * (0.1 + 0.2 + 0.3) / 3)
    assert verdict.better
    assert verdict.differences["a"][0] == pytest.approx(100 * 0.7 / 3)
    assert not compared(old, new, clusters).better
    assert not compared(old, old, clusters).better


def test_more_comparisons_ask_for_more():
    clusters = {r: r for r in RECORDS}
    old = Measured({"a": dict.fromkeys(RECORDS, 0.5)})
    new = Measured({"a": {r: 0.63 if i % 2 else 0.45 for i, r in enumerate(RECORDS)}})  # 0.04 ± 0.014
    assert compared(new, old, clusters).better
    assert not compared(new, old, clusters, comparisons=200).better


# -- what may not be tried -----------------------------------------------------------------------------------------

TEST = [EditRecord("demo/test/0", EditRequest("The king of Nowhere is", "Bill", "demo", "Nowhere"))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Make Bill the answer to all of it.", "leaks a test record: bill"),
        ("Too short.", "has fewer than 4 words"),
        ("Change [TOPIC] to something else now.", "has an unknown slot: [TOPIC]"),
        (WORSE[1].upper(), "is a duplicate"),
        ("Kept out of everything that happens there.", "is a near-duplicate"),  # of the held-out one
        (WORSE[0], "is what it should replace"),
        ("", "is empty"),
    ],
)
def test_revisions_that_break_a_rule_are_never_measured(server, tmp_path, text, problem):
    server.script = [proposal(("d-1", text))]
    trial = Stub()
    search = optimizer(server, tmp_path, trial, rules=Rules(test=Terms.of(TEST)), rounds=1)
    search.run()
    assert set(trial.measured) == set(WORSE)
    assert problem in search.state.refused[0]


def test_a_revision_may_be_like_what_it_replaces(server, tmp_path):
    alike = WORSE[0].replace("seven", "eleven")
    server.script = [proposal(("d-1", alike))]
    trial = Stub({alike: 0.9})
    assert optimizer(server, tmp_path, trial, rounds=1).run().get("d-1-r1").text == alike


def test_an_unknown_id_is_sent_back(server, tmp_path):
    server.script = [proposal(("d-9", GOOD)), proposal(("d-1", GOOD))]
    search = optimizer(server, tmp_path, rounds=1)
    assert search.run().get("d-1-r1").text == GOOD
    assert "names the unknown id 'd-9'" in server.asked[1]


def test_a_bank_that_breaks_a_rule_is_refused(server, tmp_path):
    bank = InstructionBank("Demo", (Description("d-1", "train", "Make Bill the king of it all."),))
    with pytest.raises(UserError, match="description 'd-1' leaks a test record: bill"):
        optimizer(server, tmp_path, bank=bank, rules=Rules(test=Terms.of(TEST)))


# -- the budget, faults, resuming ----------------------------------------------------------------------------------


def test_the_budget_ends_a_search_and_more_of_it_goes_on(server, tmp_path):
    server.script = [proposal(("d-2", GOOD)), proposal(("d-1", NONSENSE[0])), proposal(("d-1", NONSENSE[1]))]
    file = tmp_path / "work" / "ledger.json"
    search = optimizer(server, tmp_path, ledger=Ledger.open(1, 100_000, file))
    assert search.run().get("d-2-r1").text == GOOD
    assert search.state.stopped == "the budget is spent"
    assert len(server.requests) == 1
    trial = Stub()
    more = optimizer(server, tmp_path, trial, Ledger.open(9, 100_000, file))
    assert more.run().get("d-2-r1").text == GOOD
    assert more.state.stopped == "nothing improved for 2 rounds"
    assert more.writer.ledger.calls == 3
    assert set(trial.measured) == set(NONSENSE)  # nothing twice


def test_a_search_that_is_cut_off_goes_on_to_the_same_end(server, tmp_path):
    script = [proposal(("d-2", GOOD), ("d-1", NONSENSE[0])), proposal(("d-1", NONSENSE[1]))]
    server.script = list(script)
    whole = optimizer(server, tmp_path / "whole")
    expected = whole.run()

    class Killed(Stub):
        left = 3

        def measure(self, text):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().measure(text)

    server.script, server.requests[:] = list(script), []
    measured = []
    for _ in range(9):
        trial = Killed()
        trial.left = 1
        search = optimizer(server, tmp_path / "cut", trial)
        try:
            found = search.run()
        except KeyboardInterrupt:
            continue
        finally:
            measured += trial.measured
        break
    assert found == expected
    assert sorted(measured) == sorted({*WORSE, GOOD, *NONSENSE})
    assert len(server.requests) == len(whole.state.rounds) - 1  # the cache knows the question of a cut-off round
    table = runs(root=tmp_path / "cut" / "store")
    assert sorted(table["name"]) == sorted(
        ["optimize/demo", *(f"optimize/demo/round-{i}" for i in range(len(search.state.rounds)))]
    )
    assert plain(search.state.rounds) == plain(whole.state.rounds)


def plain(rounds):
    """Rounds as a file gives them, without what they cost."""
    return json.loads(json.dumps([{k: v for k, v in done.items() if k != "ledger"} for done in rounds]))


def test_a_fault_is_one_line_and_the_state_stays(server, tmp_path):
    server.script = [proposal(("d-2", GOOD)), failure(500, "oh")]
    search = optimizer(server, tmp_path)
    with pytest.raises(UserError, match="fails with 500"):
        search.run()
    server.script = [proposal(("d-1", NONSENSE[0])), proposal(("d-1", NONSENSE[1]))]
    again = optimizer(server, tmp_path)
    assert [done["kept"] for done in again.state.rounds] == [0, 1]
    assert again.run().get("d-2-r1").text == GOOD


def test_the_state_of_another_search_is_refused(server, tmp_path):
    server.script = [proposal(("d-2", GOOD))]
    optimizer(server, tmp_path, rounds=1).run()
    with pytest.raises(UserError, match=r"state\.json: is of another search \(search differ"):
        optimizer(server, tmp_path, seed=1)
    (tmp_path / "work" / "state.json").write_text('{"half":')
    with pytest.raises(UserError, match="cannot be read"):
        optimizer(server, tmp_path)


@pytest.mark.parametrize("name", ["rounds", "patience", "revisions"])
def test_numbers_are_checked(name):
    with pytest.raises(UserError, match=f"{name} must be at least 1"):
        Search(**{name: 0})


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """An untrained editor of the embedded LM that reads instructions."""
    folder = tmp_path_factory.mktemp("editor")
    lm = ie.FrozenLM.from_pretrained("tiny")
    ie.build_editor("mend", lm, rank=4, instructions=True, edit_rate=0.01).save_pretrained(folder / "reads")
    ie.build_editor("mend", lm, rank=4).save_pretrained(folder / "plain")
    return folder


def command(folder, editor, *more):
    return main(
        [
            "instructions", "optimize", "--task=counterfact", f"--editor={editor}", f"--work={folder}/work",
            f"--out={folder}/bank.yaml", f"--root={folder}/store", f"--cache={folder}/cache", "--records=4", *more,
        ]
    )  # fmt: skip


def test_the_command_from_end_to_end(server, tmp_path, editor, capsys, monkeypatch):
    verdict = Verdict(1.0, True, {"reliability": (1.0, 0.5, 1.5)})
    monkeypatch.setattr("instructedit.writing.optimize.compared", lambda *args: verdict)
    server.script = [proposal(("cf-01", NONSENSE[0]), ("cf-02", NONSENSE[1])), proposal()]
    options = ["--model=scripted", f"--base_url={server.url}", "--patience=1", "--tries=1"]
    assert command(tmp_path, editor / "reads", *options) == 0
    bank = InstructionBank.load(tmp_path / "bank.yaml")
    assert bank.get("cf-01-r1").text == NONSENSE[0]
    assert len(bank.descriptions) == 15
    said = capsys.readouterr().out
    assert "2 calls" in said
    assert "kept: cf-01 is now" in said
    assert "stopped: nothing improved for 1 rounds" in said
    state = json.loads((tmp_path / "work" / "state.json").read_text())
    validation = {r.id for r in ie.load_records("counterfact", split="val")[0]}
    measured = {r for found in state["measured"].values() for values in found["values"].values() for r in values}
    assert measured <= validation
    assert len(measured) == 4
    test = {r.request.prompt for r in ie.load_records("counterfact", split="test")[0]}
    sent = "\n".join(server.asked)
    assert not [prompt for prompt in test if prompt in sent]

    assert command(tmp_path, editor / "reads", *options) == 2
    assert "bank.yaml: is there already" in capsys.readouterr().err


def test_a_local_writer_runs_offline(tmp_path, editor, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert command(tmp_path, editor / "reads", "--model=local:tiny", "--rounds=1", "--split=heldout") == 0
    said = capsys.readouterr().out
    assert "1 calls" in said
    assert "stopped: " in said
    assert (tmp_path / "bank.yaml").exists() == ("improved bank" in said)


def test_an_editor_without_instructions_is_refused(server, tmp_path, editor, capsys):
    assert command(tmp_path, editor / "plain", "--model=scripted", f"--base_url={server.url}") == 2
    assert "reads no instructions" in capsys.readouterr().err


def test_a_trial_takes_validation_records_alone(editor):
    lm = ie.FrozenLM.from_pretrained("tiny")
    reads = ie.load_editor(editor / "reads", lm)
    with pytest.raises(UserError, match=r"record counterfact/test/\d+ is not of the validation split"):
        EditorTrial(lm, reads, ie.load_records("counterfact", split="test")[0])
    records = ie.load_records("counterfact", split="val")[0]
    trial = EditorTrial(lm, reads, records, count=3)
    measured = trial.measure("Change the fact as it is said here.")
    from instructedit.evaluation import Evaluation, evaluate

    chosen = [r for r in records if r.id in trial.clusters]
    table = evaluate(lm, reads, chosen, Evaluation(False, 0, instruction="Change the fact as it is said here.")).summary
    for metric in ("reliability", "generalization", "locality", "portability"):
        mean = table[table["metric"] == metric]["mean"].item()
        assert measured.mean(metric, trial.clusters) == pytest.approx(mean), metric
    assert all("Description:" not in line for line in measured.failures)
