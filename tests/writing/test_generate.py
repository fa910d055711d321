"""`instructedit instructions generate`, from end to end: good replies, every bad one, and a local writer."""

from __future__ import annotations

import json
from datetime import date

import pytest
import yaml
from tests.writing.conftest import DROP, KEY, completion, failure

from instructedit.cli import main
from instructedit.errors import UserError
from instructedit.instructions import InstructionBank
from instructedit.writing.ranking import quality

OPENINGS = ("Alter", "Swap", "Bend", "Twist", "Shift", "Renew", "Adjust", "Overhaul", "Tweak", "Recast")
ENDINGS = (
    "whatever was believed before", "one stored claim only", "an answer until it fits", "its old value for good",
    "knowledge as somebody wishes", "that which seemed certain", "the reply given so far", "a memory beyond doubt",
    "facts nobody questioned", "what everybody would say",
)  # fmt: skip
#: Twenty descriptions without many words in common.
MANY = [f"{o} {e}, {w}." for o, e, w in zip(OPENINGS, ENDINGS, ("please",) * 10, strict=True)]
MANY += [
    f"Let {e.split()[-1]} {o.lower()} under {chr(97 + i) * 4} conditions."
    for i, (o, e) in enumerate(zip(OPENINGS, ENDINGS, strict=True))
]


def listing(*texts: str) -> dict:
    return completion({"descriptions": list(texts)})


def generate(server, folder, *more: str, task: str = "counterfact") -> int:
    return main(
        [
            "instructions", "generate", f"--task={task}", "--model=scripted", f"--base_url={server.url}",
            f"--out={folder}/bank.yaml", f"--cache={folder}/cache", "--tries=2", "--concurrency=1", *more,
        ]
    )  # fmt: skip


def test_a_bank_from_end_to_end(server, tmp_path, capsys):
    server.script = [listing(*MANY[:10]), listing(*MANY[10:])]
    assert generate(server, tmp_path, "--seed=3") == 0
    bank = InstructionBank.load(tmp_path / "bank.yaml")
    assert bank.task == "CounterFact"
    assert [d.split for d in bank.descriptions] == ["train"] * 9 + ["heldout"] + ["unseen"] * 5
    assert [d.id for d in bank.descriptions] == [f"counterfact-{i:02d}" for i in range(1, 16)]
    best = sorted(MANY, key=quality)[5:]
    assert min(map(quality, (d.text for d in bank.descriptions))) >= quality(best[0])
    assert {d.text for d in bank.descriptions} <= set(MANY)
    assert (bank.provenance.model, bank.provenance.prompt, bank.provenance.seed) == ("scripted", "1", 3)
    assert abs((date.today() - date.fromisoformat(bank.provenance.date)).days) <= 1
    said = capsys.readouterr().out
    assert "2 calls (0 of them retries), 0 replies from the cache, 200 + 100 tokens" in said
    assert "20 of 20 descriptions are usable" in said
    assert "terms of 218 test records" in said
    asked = server.asked[0]
    assert "Write 10 descriptions" in asked
    assert "counterfactual" in asked
    assert asked.count("- prompt: ") == 1 + 3  # the field and three examples

    assert generate(server, tmp_path, "--seed=3", "--overwrite=true") == 0
    assert "0 calls (0 of them retries), 2 replies from the cache" in capsys.readouterr().out
    assert InstructionBank.load(tmp_path / "bank.yaml") == bank
    assert len(server.requests) == 2


def test_the_unseen_are_not_the_worst(server, tmp_path):
    """Splits are dealt out by the seed."""
    server.script = [listing(*MANY[:10]), listing(*MANY[10:])]
    assert generate(server, tmp_path) == 0
    first = InstructionBank.load(tmp_path / "bank.yaml")
    server.script = [listing(*MANY[:10]), listing(*MANY[10:])]
    assert generate(server, tmp_path, "--seed=1", "--overwrite=true") == 0
    second = InstructionBank.load(tmp_path / "bank.yaml")
    assert {d.text for d in first.descriptions} == {d.text for d in second.descriptions}
    assert {d.text for d in first.split("unseen")} != {d.text for d in second.split("unseen")}


def test_nothing_takes_the_place_of_a_bank_unasked(server, tmp_path, capsys):
    (tmp_path / "bank.yaml").write_text("good")
    assert generate(server, tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert server.requests == []


LEAK = "Whatever happens, Peru is what the editor must think of."
BAD = {
    "a duplicate": (MANY[0].upper(), "is a duplicate (1)"),
    "a near-duplicate": (MANY[0].replace(", please", " right now"), "is a near-duplicate (1)"),
    "an empty one": ("  \n ", "is empty (1)"),
    "a leak": ("leak", "leaks a test record (1)"),
    "a slot": ("Change [TOPIC] into something else altogether.", "has an unknown slot (1)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_description_is_refused_named_and_replaced(server, tmp_path, capsys, name):
    from instructedit.tasks import load_records

    text, words = BAD[name]
    if text == "leak":
        test = {r.request.subject for r in load_records("counterfact", split="test")[0]}
        text = f"Whatever happens, {min(test)} is what the editor must think of."
    server.script = [listing(*MANY[:9], text), listing(*MANY[9:19]), listing(MANY[19])]
    assert generate(server, tmp_path) == 0
    assert words in capsys.readouterr().out
    assert text not in {d.text for d in InstructionBank.load(tmp_path / "bank.yaml").descriptions}
    assert "Write 1 descriptions" in server.asked[2]  # just what was missing
    assert words.removesuffix(" (1)") in server.asked[2]  # and why


def test_a_lost_slot_is_noticed(server, tmp_path, capsys):
    def slotted(i, text):
        return text if i == 4 else text[:-1] + " about [TOPIC] in a [LABEL] way."

    texts = [slotted(i, text) for i, text in enumerate(MANY)]
    server.script = [listing(*texts[:10]), listing(*texts[10:])]
    assert generate(server, tmp_path, "--n=15", "--keep=5", "--unseen=2", task="convsent") == 0
    bank = InstructionBank.load(tmp_path / "bank.yaml")
    assert {d.slots for d in bank.descriptions} == {frozenset({"LABEL", "TOPIC"})}
    assert "lacks a slot" in capsys.readouterr().out
    assert "Each must hold [LABEL] and [TOPIC] exactly so." in server.asked[0]


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([failure(404, "no such model")], "no model 'scripted', or no such address (404)"),
        ([failure(429, "slow")], "(429) in 2 tries"),
        ([failure(500, "oh")], "fails with 500 in 2 tries"),
        ([DROP], "dropped the connection in 2 tries"),
        ([completion("{")], "no usable reply in 3 attempts; the last one is not of the form"),
        ([completion('{"descriptions": [', finish="length")], "was cut off at the limit on its length"),
        ([completion(None, refusal="No, thanks.")], "is a refusal: 'No, thanks.'"),
        ([listing(*MANY[:10]), failure(500, "oh")], "fails with 500"),  # after a good beginning
        ([listing(*MANY[:10]), completion("[]")], "no usable reply"),
        ([listing(*MANY[:12])], "12 of 48 descriptions are usable"),
        ([listing()], "0 of 0 descriptions are usable; 15 are needed, so nothing is written"),
    ],
)  # fmt: skip
def test_faults_are_one_line_and_a_good_bank_stays(server, tmp_path, capsys, faults, words):
    (tmp_path / "bank.yaml").write_text("a good bank")
    server.script = faults
    assert generate(server, tmp_path, "--overwrite=true") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert (tmp_path / "bank.yaml").read_text() == "a good bank"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["bank.yaml"]


def test_passing_faults_do_no_harm(server, tmp_path, capsys):
    server.script = [
        failure(429, "slow"), completion("{"), completion(None, refusal="No."), listing(*MANY[:10]),
        failure(500, "oh"), listing(*MANY[10:]),
    ]  # fmt: skip
    assert generate(server, tmp_path) == 0
    assert "6 calls (2 of them retries)" in capsys.readouterr().out
    assert len(InstructionBank.load(tmp_path / "bank.yaml").descriptions) == 15


def test_no_key(server, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert generate(server, tmp_path) == 2
    assert "no key: set $OPENAI_API_KEY" in capsys.readouterr().err
    assert server.requests == []


def test_the_key_stays_out_of_everything(server, tmp_path, capsys):
    server.script = [completion(f"echo {KEY}"), listing(*MANY[:10]), listing(*MANY[10:])]
    assert generate(server, tmp_path) == 0
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) == 4  # the bank and three replies
    assert not [text for text in [*texts, *capsys.readouterr()] if KEY in text]


def test_the_cap_is_hard(server, tmp_path, capsys):
    server.script = [listing(*MANY[:10]), listing(*MANY[10:])]
    assert generate(server, tmp_path, "--max_calls=1") == 2
    assert "the budget is spent: 1 calls" in capsys.readouterr().err
    assert len(server.requests) == 1
    assert not (tmp_path / "bank.yaml").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n=14"], "n = 14 descriptions are too few to keep 10 and 5"),
        (["--keep=1"], "keep must be at least 2"),
        (["--tries=0"], "tries must be positive"),
    ],
)
def test_wrong_numbers(server, tmp_path, capsys, options, words):
    assert generate(server, tmp_path, *options) == 2
    assert words in capsys.readouterr().err
    assert server.requests == []


def test_the_model_as_a_judge(server, tmp_path, capsys):
    def judge(request):
        lines = [line for line in request["messages"][1]["content"].splitlines() if line[:1].isdigit()]
        grades = [
            {"number": i, "clarity": 5 if MANY[3] in line else 1, "concision": 5 if MANY[3] in line else 1}
            for i, line in enumerate(lines, 1)
        ]
        return completion({"grades": grades})

    server.script = [listing(*MANY[:10]), completion({"grades": [{"number": 1, "clarity": 5, "concision": 5}]}), judge]
    plan = ["--n=10", "--keep=2", "--unseen=0", "--judge=true"]
    assert generate(server, tmp_path, *plan) == 0
    assert MANY[3] in {d.text for d in InstructionBank.load(tmp_path / "bank.yaml").descriptions}
    assert "must grade each of 1 to 10 once" in server.asked[2]
    assert generate(server, tmp_path, *plan, "--model=local:tiny", "--overwrite=true") == 2
    capsys.readouterr()


# -- local writers -------------------------------------------------------------------------------------------------


def test_the_tiny_lm_writes_offline_and_is_told_what_was_unusable(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "bank.yaml").write_text("a good bank")
    args = [
        "instructions", "generate", "--task=convsent", "--model=local:tiny", f"--out={tmp_path}/bank.yaml",
        f"--cache={tmp_path}/cache", "--overwrite=true",
    ]  # fmt: skip
    assert main(args) == 2
    first = capsys.readouterr()
    assert "descriptions are usable; the others: lacks a slot (" in first.err
    assert "15 are needed, so nothing is written" in first.err
    assert (tmp_path / "bank.yaml").read_text() == "a good bank"
    assert main(args) == 2  # the replies are kept, and sampled by the seed
    again = capsys.readouterr()
    assert again.err == first.err
    assert "0 calls" in again.out


def test_a_local_model_that_can_write(tmp_path, monkeypatch):
    """A stub in the place of sampling: the lines go through the same checks into a bank."""
    from instructedit.lm import FrozenLM

    texts = iter(MANY)

    def sample(self, prompts, tokens, seeds, **options):
        assert options["ends"]
        assert prompts[0].endswith("\n-")
        return [" " + "\n- ".join(next(texts) for _ in range(4)) + "\n\nTask: other"]

    monkeypatch.setattr(FrozenLM, "sample", sample)
    assert main(
        [
            "instructions", "generate", "--task=counterfact", "--model=local:tiny", f"--out={tmp_path}/bank.yaml",
            f"--cache={tmp_path}/cache", "--concurrency=1",
        ]
    ) == 0  # fmt: skip
    bank = InstructionBank.load(tmp_path / "bank.yaml")
    assert {d.text for d in bank.descriptions} <= set(MANY)
    assert bank.provenance.model == "local:tiny"


# -- provenance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"date": "yesterday"}, "provenance: date must be a day"),
        ({"seed": "x"}, "provenance: seed must be of type int"),
        ({"model": " "}, "provenance: model is empty"),
        (None, "provenance: missing key 'model'"),
    ],
)
def test_provenance_is_checked(tmp_path, change, words):
    good = {"model": "m", "prompt": "1", "date": "2026-01-31", "seed": 0}
    data = {"task": "Demo", "version": 1, "descriptions": [{"id": "a", "split": "train", "text": "Make it so."}]}
    file = tmp_path / "bank.yaml"
    file.write_text(yaml.safe_dump(data | {"provenance": good}))
    assert InstructionBank.load(file).provenance.date == "2026-01-31"
    file.write_text(json.dumps(data | {"provenance": {} if change is None else good | change}))
    with pytest.raises(UserError, match=words):
        InstructionBank.load(file)
