"""The instruction banks: what ships, how it is drawn and rendered, and what is refused."""

from __future__ import annotations

import pickle
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from instructedit.errors import UserError
from instructedit.instructions import (
    Description,
    InstructionBank,
    Instructor,
    Split,
    bank_names,
    render,
    render_records,
)
from instructedit.instructions.bank import BANKS
from instructedit.records import EditRecord, EditRequest, Probe

REQUEST = EditRequest("The capital of France is", "Lyon", task="counterfact")
MOODY = EditRequest("How is tea?", "Lovely.", task="convsent", slots={"LABEL": "positive", "TOPIC": "tea"})
#: Drawn for REQUEST with seed 3 and key "r1" at steps 0 to 7.
GOLDEN = ["cf-04", "cf-08", "cf-09", "cf-06", "cf-05", "cf-09", "cf-04", "cf-05"]


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "split": "train", "text": "Make it so.", **changes}


def document(*entries: Any, **changes: Any) -> dict[str, Any]:
    return {"task": "Demo", "version": 1, "descriptions": list(entries) or [entry()], **changes}


def write(folder: Path, content: Any) -> Path:
    path = folder / "demo.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


# What ships


def test_the_papers_tasks_have_banks() -> None:
    assert {"counterfact", "recent", "convsent", "zsre"} <= set(bank_names())
    assert list(bank_names()) == sorted(bank_names())


@pytest.mark.parametrize("name", bank_names())
def test_shipped_bank(name: str) -> None:
    bank = InstructionBank.load(BANKS / f"{name}.yaml")
    assert bank.task.lower() == name
    assert [d.split for d in bank.descriptions] == ["train"] * 9 + ["heldout"] + ["unseen"] * 5
    assert all(8 <= len(d.text.split()) <= 18 for d in bank.descriptions)
    assert {d.slots for d in bank.descriptions} == {frozenset({"LABEL", "TOPIC"} if name == "convsent" else ())}


def test_ids_and_wordings_are_unique_across_banks() -> None:
    everything = [d for name in bank_names() for d in InstructionBank.for_task(name).descriptions]
    assert len({d.id for d in everything}) == len({d.text for d in everything}) == len(everything)


@pytest.mark.parametrize("name", bank_names())
def test_wordings_differ_truly(name: str) -> None:
    bags = [set(re.findall(r"\w+", d.text.lower())) for d in InstructionBank.for_task(name).descriptions]
    overlaps = [len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i]]
    assert max(overlaps) < 0.5


def test_for_task_takes_the_title_too() -> None:
    assert InstructionBank.for_task("ConvSent") is InstructionBank.for_task("convsent")


# Rendering


def test_render_by_hand() -> None:
    bank = InstructionBank("ConvSent", (Description("x", "train", "Be [LABEL] on [TOPIC], yes [TOPIC]."),))
    expected = "Task: ConvSent\nDescription: Be positive on tea, yes tea.\nInput: How is tea?"
    assert render(bank, bank.descriptions[0], MOODY, MOODY.prompt) == expected
    assert render(bank, bank.descriptions[0], {"LABEL": "positive", "TOPIC": "tea"}, MOODY.prompt) == expected


def test_render_does_not_fill_values_again() -> None:
    bank = InstructionBank("ConvSent", (Description("x", "train", "[LABEL] [TOPIC]"),))
    text = render(bank, bank.descriptions[0], {"LABEL": "[TOPIC]", "TOPIC": r"\1"}, "[LABEL]")
    assert text == "Task: ConvSent\nDescription: [TOPIC] \\1\nInput: [LABEL]"


@pytest.mark.parametrize("slots", [{"LABEL": "positive"}, {"LABEL": "positive", "TOPIC": " "}])
def test_render_needs_every_slot(slots: dict[str, str]) -> None:
    bank = InstructionBank.for_task("convsent")
    with pytest.raises(UserError, match=r"^no value for slot \[TOPIC\] of description 'cs-01' of task ConvSent$"):
        render(bank, bank.get("cs-01"), slots, "How is tea?")


WORDS = st.text(st.characters(exclude_characters="[]"), min_size=1).filter(str.strip)


@given(
    task=st.sampled_from(bank_names()), index=st.integers(0, 14), label=WORDS, topic=WORDS, prompt=st.text(max_size=50)
)
def test_rendered_text_ends_with_the_prompt_and_is_filled(
    task: str, index: int, label: str, topic: str, prompt: str
) -> None:
    bank = InstructionBank.for_task(task)
    text = render(bank, bank.descriptions[index], {"LABEL": label, "TOPIC": topic}, prompt)
    assert text.startswith(f"Task: {bank.task}\nDescription: ")
    assert text.endswith(f"\nInput: {prompt}")
    assert "[" not in text.removesuffix(prompt)


# Drawing


def test_draw_covers_the_training_split_evenly_and_nothing_else() -> None:
    bank = InstructionBank.for_task("zsre")
    rng = random.Random(0)
    counts = Counter(bank.draw(rng).id for _ in range(9000))
    assert set(counts) == {d.id for d in bank.split("train")}
    assert all(850 < n < 1150 for n in counts.values())  # five standard deviations


def test_instructor_covers_the_training_split_over_steps_and_over_keys() -> None:
    train = {
        f"Task: CounterFact\nDescription: {d.text}" for d in InstructionBank.for_task("counterfact").split("train")
    }
    assert {Instructor().prefix(REQUEST, step=i).removesuffix("\nInput: ") for i in range(300)} == train
    assert {Instructor().prefix(REQUEST, key=str(i)).removesuffix("\nInput: ") for i in range(300)} == train


@pytest.mark.parametrize(("split", "count"), [("heldout", 1), ("unseen", 5)])
def test_instructor_draws_from_its_split_alone(split: Split, count: int) -> None:
    texts = {Instructor(split).prefix(REQUEST, step=i) for i in range(100)}
    assert len(texts) == count
    assert texts.isdisjoint(Instructor().prefix(REQUEST, step=i) for i in range(100))


def test_draws_are_the_same_in_every_process() -> None:
    def drawn(step: int) -> str:
        prefix = Instructor(seed=3).prefix(REQUEST, step=step, key="r1")
        return next(d.id for d in InstructionBank.for_task("counterfact").descriptions if d.text in prefix)

    # Fixed values: a draw that hung on the process, or on the draws before it, would not meet them.
    assert [drawn(step) for step in reversed(range(8))] == GOLDEN[::-1]


@pytest.mark.parametrize("change", [{"step": 1}, {"key": "b"}, {"seed": 1}])
def test_step_key_and_seed_each_draw_afresh(change: dict[str, Any]) -> None:
    def sequence(seed: int = 0, step: int = 0, key: str = "") -> list[str]:
        return [Instructor(seed=seed).prefix(REQUEST, step=step + i, key=key) for i in range(20)]

    assert sequence() == sequence()
    assert sequence() != sequence(**change)


def test_one_description_for_all_prompts_of_an_edit() -> None:
    probes = (Probe("generalization", "a", ("b",)), Probe("wanted", "c", ("d",)), Probe("locality", "e", ("f",)))
    record = EditRecord("r9", MOODY, probes)
    (rendered,) = render_records([record], Instructor(), [4])
    prefix = Instructor().prefix(MOODY, step=4, key="r9")
    assert prefix
    assert rendered.prompt == prefix + MOODY.prompt
    assert [rendered.ask(probe) for probe in probes] == [f"{prefix}a", f"{prefix}c", "e"]
    assert pickle.loads(pickle.dumps(rendered)) == rendered
    assert render_records([record], None)[0].prompt == MOODY.prompt
    with pytest.warns(DeprecationWarning, match=r"Instructor\.prefix"):
        assert Instructor().front(MOODY, step=4, key="r9")("a") == f"{prefix}a"


def test_fixed_description() -> None:
    expected = f"Task: CounterFact\nDescription: {InstructionBank.for_task('counterfact').get('cf-12').text}\nInput: Hm"
    assert {Instructor(description_id="cf-12").prefix(REQUEST, step=i) + "Hm" for i in range(20)} == {expected}
    assert Instructor(split=None, description_id="cf-12").prefix(REQUEST) + "Hm" == expected


def test_no_split_puts_nothing_in_front() -> None:
    assert Instructor(split=None).prefix(EditRequest("a", "b")) + "a prompt" == "a prompt"


# What is refused


BAD = {
    "not a mapping": (["a"], "must hold the keys task, version and descriptions"),
    "not YAML": ("task: [", "not valid YAML"),
    "missing task": ({"version": 1, "descriptions": [entry()]}, "missing key 'task'"),
    "missing version": ({"task": "Demo", "descriptions": [entry()]}, "missing key 'version'"),
    "missing descriptions": ({"task": "Demo", "version": 1}, "missing key 'descriptions'"),
    "empty task": (document(task=" "), "task is empty"),
    "other version": (document(version=2), "version 2 is not supported, only 1"),
    "version of wrong type": (document(version="1"), "version must be of type int, got '1'"),
    "no descriptions": (document(descriptions=[]), "descriptions must not be empty"),
    "description not a mapping": (document("text"), "descriptions[0]: must hold the keys id, split and text"),
    "missing text": (document(entry(), {"id": "b", "split": "train"}), "descriptions[1]: missing key 'text'"),
    "id of wrong type": (document(entry(id=7)), "descriptions[0]: id must be of type str, got 7"),
    "unknown split": (document(entry(split="test")), "descriptions[0]: unknown split 'test'; one of train, heldout"),
    "empty text": (document(entry(text=" \n")), "descriptions[0]: text is empty"),
    "duplicate id": (document(entry(), entry(text="Other.")), "duplicate id 'a'"),
    "duplicate text": (document(entry(), entry(id="b", text="make  it SO")), "text of 'b' repeats that of 'a'"),
    "slot lacking": (
        document(entry(text="[LABEL] on [TOPIC]"), entry(id="b", text="be [LABEL]")),
        "text of 'b' lacks the slot [TOPIC]",
    ),
    "unknown slot": (document(entry(text="On [TOPC].")), "text of 'a' has the unknown slot [TOPC]"),
    "declared slot lacking": (document(slots=["STYLE"]), "text of 'a' lacks the slot [STYLE]"),
    "slots of wrong type": (document(slots=[1]), "slots must be a list of names"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bank(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        InstructionBank.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        InstructionBank.load(tmp_path / "none.yaml")


def test_bank_with_slots_of_its_own(tmp_path: Path) -> None:
    bank = InstructionBank.load(write(tmp_path, document(entry(text="In  [STYLE]\nstyle."), slots=["STYLE"])))
    assert bank.descriptions == (Description("a", "train", "In [STYLE] style."),)


def test_unknown_and_empty_splits(tmp_path: Path) -> None:
    bank = InstructionBank.load(write(tmp_path, document()))
    with pytest.raises(UserError, match="task Demo has no heldout descriptions"):
        bank.draw(random.Random(0), "heldout")
    with pytest.raises(UserError, match="unknown split 'test'; one of train, heldout, unseen"):
        bank.split("test")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown split 'test'"):
        Instructor("test")  # type: ignore[arg-type]


def test_unknown_description() -> None:
    with pytest.raises(UserError, match="task CounterFact has no description 'rc-01'; there are: cf-01, "):
        Instructor(description_id="rc-01").prefix(REQUEST)


@pytest.mark.parametrize("task", [None, "poetry", "../banks/zsre"])
def test_request_without_a_bank_lists_those_there_are(task: str | None) -> None:
    with pytest.raises(UserError, match=f"there are: {', '.join(bank_names())}"):
        Instructor().prefix(EditRequest("a", "b", task=task))


def test_request_without_slot_values_fails_at_once() -> None:
    with pytest.raises(UserError, match=r"slot \[LABEL\] of description 'cs-10' of task ConvSent"):
        Instructor("heldout").prefix(EditRequest("a", "b", task="convsent", slots={"TOPIC": "tea"}))
