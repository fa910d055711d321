"""Neighborhood probes: which questions about other subjects are added to records, and how they are scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import instructedit as ie
from instructedit.data.module import EditData, TaskSource
from instructedit.data.neighborhood import template, with_neighbors
from instructedit.records import EditRecord, EditRequest, Probe


def record(subject, target="Lyon", words="The capital of {} is", task="counterfact"):
    """A record that asks the words about a subject."""
    return EditRecord(f"{task}/{subject}", EditRequest(words.format(subject), target, task, subject))


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The capital of France is", "France", ("The capital of ", " is")),
        ("France", "France", ("", "")),
        ("France and France", "France", ("", " and France")),
        ("The capital of France is", "Spain", None),
        ("The capital of France is", None, None),
        ("The capital of France is", "", None),
    ],
)
def test_a_template_is_what_stands_before_and_after_the_subject(prompt, subject, expected):
    assert template(prompt, subject) == expected


def test_neighbors_are_requests_in_the_same_words_about_other_subjects():
    records = [
        record("France"), record("Spain", "Rome"), record("Nile", words="The mouth of {} is"),
        record("Peru", task="recent"),
        EditRecord("x", EditRequest("The capital of Spain is", "Oslo")), record("France", "Bonn"),
    ]  # fmt: skip
    found = with_neighbors(records, 2)
    assert [one.probes for one in found] == [
        (Probe("neighborhood", "The capital of Spain is", ("Rome",)),),
        (Probe("neighborhood", "The capital of France is", ("Lyon",)),), (), (), (),
        (Probe("neighborhood", "The capital of Spain is", ("Rome",)),),
    ]  # fmt: skip
    assert found[2] is records[2]
    assert with_neighbors(records[:1], 2, records)[0].probes == found[0].probes


@given(st.lists(st.sampled_from("ABCDEF"), max_size=8), st.integers(0, 6))
def test_there_are_as_many_neighbors_as_asked_for_and_there_are_subjects(subjects, count):
    for own, one in zip(subjects, with_neighbors([record(subject) for subject in subjects], count), strict=True):
        asked = [probe.prompt for probe in one.of("neighborhood")]
        assert len(asked) == len(set(asked)) == min(count, len(set(subjects)) - 1)
        assert one.request.prompt not in asked
        assert one.request.subject == own


def test_neighborhood_is_a_metric_beside_locality(lm):
    records = [record("France"), record("Spain", "Rome")]
    records = [ie.EditRecord(r.id, r.request, (Probe("locality", "Who", ("he",)),)) for r in records]
    editor = ie.build_editor("ft_l", lm, steps=3)
    settings = ie.Evaluation(generate=False, fluency_tokens=0)
    plain, more = (ie.evaluate(lm, editor, some, settings) for some in (records, ie.with_neighbors(records, 1)))
    row = more.table[more.table.kind == "neighborhood"].iloc[0]
    assert (row.prompt, row.answer, row["view"], row["main"]) == ("The capital of Spain is", "Rome", "plain", True)
    by_hand = ie.evaluate(
        lm, editor, [ie.EditRecord("a", records[0].request, (Probe("locality", row.prompt, ("Rome",)),))], settings
    )
    assert row.agreement == by_hand.table[by_hand.table.kind == "locality"].agreement.item()
    metrics = more.summary.set_index("metric")["mean"]
    assert metrics["neighborhood"] == pytest.approx(
        100 * more.table[more.table.kind == "neighborhood"].agreement.mean()
    )
    assert metrics["locality"] == plain.summary.set_index("metric")["mean"]["locality"]


def test_neighbors_are_asked_behind_the_instruction_too(lm):
    records = ie.with_neighbors([record("France"), record("Spain", "Rome")], 1)
    editor = ie.build_editor("instructedit", lm, rank=3, edit_rate=0.02)
    found = ie.evaluate(lm, editor, records, ie.Evaluation(generate=False, fluency_tokens=0))
    rows = found.table[found.table.kind == "neighborhood"]
    assert rows["view"].tolist() == ["plain", "instructed"] * 2
    assert rows["main"].tolist() == [True, False] * 2
    requests = found.table[(found.table.kind == "reliability") & (found.table["view"] == "instructed")]
    for own, one in zip(requests.prompt, records, strict=True):
        prefix = own.removesuffix(one.request.prompt)
        (probe,) = one.of("neighborhood")
        assert prefix
        assert f"{prefix}{probe.prompt}" in set(rows.prompt)
    metrics = found.summary.set_index("metric")["mean"]
    for name, view in (("neighborhood", "plain"), ("neighborhood.instructed", "instructed")):
        assert metrics[name] == pytest.approx(100 * rows[rows["view"] == view].agreement.mean())
    assert metrics["neighborhood"] != metrics["neighborhood.instructed"]
    assert "locality.instructed" not in metrics


def test_a_test_has_as_many_as_it_is_told_from_the_whole_split_and_says_who_has_none():
    source = TaskSource("counterfact", size=9)
    with_, without = (EditData(train=[source], test=[source], neighbors=count) for count in (2, 0))
    for data in (with_, without):
        data.setup("test")
    (found,), (plain,) = (data.records["test"].values() for data in (with_, without))
    assert [one.id for one in found] == [one.id for one in plain]
    whole, _ = ie.load_records("counterfact", "tiny", "test")
    asked = {one.request.prompt for one in whole}
    probes = [probe for one in found for probe in one.of("neighborhood")]
    assert probes
    assert {probe.prompt for probe in probes} <= asked
    assert not any(one.of("neighborhood") for one in plain)
    alone = sum(not one.of("neighborhood") for one in found)
    assert sum(with_.reports[0].noted.values()) - sum(without.reports[0].noted.values()) == alone
    with_.setup("fit")
    assert not any(one.of("neighborhood") for part in ("fit", "validate") for one in with_.records[part]["counterfact"])
