"""The numbers of a report are those of the plain model with the edit in its weights; its verdicts are what happened."""

import json
import math

import pytest
import torch
from tests.quick import QUICK
from tests.reference import answer_logits, assert_untouched, dense_copy, footprint, greedy

import instructedit as ie
from instructedit.errors import UserError
from instructedit.evaluation.drift import text_sample
from instructedit.reports import EditCase
from instructedit.reports.measure import Reply, weights_fingerprint
from instructedit.reports.neighbours import draw_neighbours, draw_paraphrases
from instructedit.reports.report import Answer, RequestReport
from instructedit.testbed.world import world

REQUESTS = [
    ie.EditRequest("The capital of Peru is", "Lyon", subject="Peru"),
    ie.EditRequest("The river of Cairo is", "Rhine", subject="Cairo"),
]
CASES = [EditCase(REQUESTS[0], ("Peru's capital is",), ("The capital of Chile is", "Tea is")), EditCase(REQUESTS[1])]


def report_of(lm, cases=CASES, **options):
    options = {"neighbours": 3, "max_new_tokens": 4} | options
    return ie.edit(lm, ie.build_editor("ft_l", lm, lr=0.2, bound=0.2, steps=8), cases, **options)


@pytest.mark.parametrize("joint", [False, True])
def test_every_number_is_that_of_the_merged_plain_model(lm, joint):
    before = footprint(lm)
    report = report_of(lm, joint=joint, ask=["Who are you?"])
    assert_untouched(lm, before)
    assert len(report.edits) == (1 if joint else 2)
    plain = dense_copy(lm, {})
    for number, each in enumerate(report.requests):
        edit = report.edits[0 if joint else number]
        merged = dense_copy(lm, {site: edit.delta(site)[0] for site in edit.sites})
        assert [answer.role for answer in each.answers].count("ask") == 1
        for answer in each.answers:
            for model, reply in ((plain, answer.before), (merged, answer.after)):
                check(lm, model, answer.prompt, each.request.target, reply)
            k = len(lm.tokenizer(" " + each.request.target)["input_ids"])
            texts = [lm.tokenizer.decode(greedy(model, lm.tokenizer, answer.prompt, 4)) for model in (plain, merged)]
            words = [lm.tokenizer(text, add_special_tokens=False)["input_ids"][:k] for text in texts]
            assert answer.changed == (words[0] != words[1])
        check_drift(lm, plain, merged, each.drift)


def test_a_single_prompt_is_asked_as_one(lm):
    case = EditCase(REQUESTS[0], "Peru's capital is", neighbours="Tea is", ask="What now?")
    (asked,) = report_of(lm, [case], ask="Who are you?").requests
    found = [(answer.role, answer.prompt) for answer in asked.answers if answer.role != "request"]
    assert found == [
        ("paraphrase", "Peru's capital is"), ("neighbour", "Tea is"), ("ask", "What now?"), ("ask", "Who are you?"),
    ]  # fmt: skip


def check(lm, model, prompt, target, reply):
    with torch.no_grad():
        logits = answer_logits(model, lm.tokenizer, prompt, target)
    ids = torch.tensor(lm.tokenizer(" " + target)["input_ids"])
    log_p = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
    assert reply.token_probability == pytest.approx(log_p.mean().exp().item(), rel=1e-3)
    assert reply.probability == pytest.approx(log_p.sum().exp().item(), rel=1e-3)
    assert reply.rank == (logits[0].argsort(descending=True) == ids[0]).nonzero().item() + 1
    assert reply.predicted == bool((logits.argmax(-1) == ids).all())
    assert reply.words == lm.tokenizer.decode(greedy(model, lm.tokenizer, prompt, 4), skip_special_tokens=True)


def check_drift(lm, plain, merged, drift):
    divergences, losses = [], ([], [])
    rows = text_sample(lm, "tiny").unpadded()
    assert [len(row) for row in rows] == [64] * 4
    with torch.no_grad():
        for row in rows:
            p, q = (model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for model in (plain, merged))
            divergences.append((p.exp() * (p - q)).sum(-1))
            for loss, each in zip(losses, (p, q), strict=True):
                loss.append(-each[torch.arange(63), row[1:]])
    assert drift.positions == 4 * 63
    assert drift.kl == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    found = (drift.perplexity_before, drift.perplexity_after)
    assert found == pytest.approx([math.exp(torch.cat(loss).mean()) for loss in losses], rel=1e-3)


def test_several_requests_are_reported_as_each_alone(lm):
    requests = [
        ie.EditRequest(f"The capital of {name} is", "Lyon") for name in ("Peru", "Chile", "Cuba", "Mali", "Fiji")
    ]
    together = report_of(lm, requests)  # more than are asked at once
    for request, found in zip(requests, together.requests, strict=True):
        (alone,) = report_of(lm, request).requests
        assert found.verdict == alone.verdict
        assert found.drift.kl == pytest.approx(alone.drift.kl, rel=1e-3)
        assert [a.after.words for a in found.answers] == [a.after.words for a in alone.answers]


def test_an_edit_that_changes_nothing_failed_and_spread_to_nobody(lm):
    (found,) = ie.edit(lm, "unedited", REQUESTS[0], neighbours=4).requests
    assert str(found.verdict) == "failed; 0 of 2 paraphrases follow; spread to none of 4 neighbours"
    assert found.drift.kl == 0
    assert found.drift.perplexity_after == found.drift.perplexity_before


def reply(predicted):
    return Reply("", 0.5, 0.5, 1, predicted, 1)


@pytest.mark.parametrize(
    ("own", "others", "said", "kind"),
    [
        ((False, True), [], "took", "took"),
        ((True, True), [], "took, as before the edit", "took"),
        ((False, False), [("neighbour", False, True, True)], "failed; spread to 1 of 1 neighbours", "failed"),
        (
            (False, True),
            [
                ("paraphrase", False, True, True), ("paraphrase", False, False, True), ("ask", False, True, True),
                ("neighbour", False, True, False), ("neighbour", True, True, False), ("neighbour", False, False, True),
            ],
            "took; 1 of 2 paraphrases follow; spread to 2 of 3 neighbours",
            "spread",
        ),
    ],
)  # fmt: skip
def test_verdicts(own, others, said, kind):
    """The cases: predicted before, predicted after, words changed."""
    answers = [Answer("request", "", "", *map(reply, own), True)]
    answers += [Answer(role, "", "", reply(old), reply(new), changed) for role, old, new, changed in others]
    verdict = RequestReport(REQUESTS[0], tuple(answers), None).verdict
    assert (str(verdict), verdict.kind) == (said, kind)


def test_a_model_that_knows_facts_takes_an_edit():
    lm = ie.FrozenLM.from_pretrained("tiny")
    report = ie.edit(lm, ie.build_editor("ft_l", lm), ie.EditRequest("The capital of France is", "Rome"))
    (found,) = report.requests
    own = found.answers[0]
    assert (own.before.words, own.after.words) == (" Paris.", " Rome.")
    assert (found.verdict.took, found.verdict.known, own.after.rank) == (True, False, 1)
    assert own.before.rank > 1
    assert own.after.token_probability > 0.9 > 0.1 > own.before.token_probability
    assert 0 < found.drift.kl < 0.5
    assert report.headline().startswith("1 of 1 requests took, spread to ")
    assert report.advice == ""


@pytest.mark.filterwarnings("error")  # the report says it, no warning beside it
def test_a_failure_says_what_to_try(lm):
    report = ie.edit(lm, ie.build_editor("ft_l", lm, lr=1e-6, bound=1e-6, steps=1), REQUESTS, neighbours=0)
    assert [each.verdict.kind for each in report.requests] == ["failed", "failed"]
    assert report.advice == "a larger lr or bound, or more steps"


def test_an_instructed_editor_is_asked_both_ways(lm):
    editor = ie.build_editor("instructedit", lm, rank=4)
    record = ie.EditRecord("x", ie.EditRequest("The capital of Peru is", "Lyon", task="counterfact"))
    (found,) = ie.edit(lm, editor, record, neighbours=0, instruction="Do it.").requests
    assert [answer.role for answer in found.answers] == ["request", "instructed", "paraphrase", "paraphrase"]
    assert "Do it." in found.answers[1].prompt


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["grace", "calinet", "t_patcher", "ike"])
def test_edits_that_no_weights_hold_are_reported_too(lm, name, joint):
    before = footprint(lm)
    editor = ie.build_editor(name, lm, **QUICK[name])
    report = ie.edit(lm, editor, REQUESTS, joint=joint, neighbours=1, max_new_tokens=4)
    assert_untouched(lm, before)
    for number, each in enumerate(report.requests):
        with lm.edited(report.edits[0 if joint else number]):
            assert each.answers[0].after.words == lm.generate(each.request.prompt, max_new_tokens=4)
        assert each.answers[0].before.words == lm.generate(each.request.prompt, max_new_tokens=4)
        assert math.isfinite(each.drift.kl)


# -- neighbours --------------------------------------------------------------------------------------------------------


def drawn(request, number=10):
    return draw_neighbours(request, number)


@pytest.mark.parametrize("subject", ["France", None])
def test_neighbours_ask_the_same_of_others_and_other_things_of_the_subject(subject):
    found = drawn(ie.EditRequest("The capital of France is", "Rome", subject=subject))
    groups = [each.group for each in found]
    assert (groups.count("same question"), groups.count("same subject"), len(set(found))) == (5, 2, 10)
    countries = {fact.subject for fact in world().known_of_table["countries"]}
    for prompt, group in found:
        assert prompt != "The capital of France is"
        if group == "same question":
            assert prompt.removeprefix("The capital of ").removesuffix(" is") in countries - {"France"}
        assert ("France" in prompt) == (group == "same subject")
    assert found == drawn(ie.EditRequest("The capital of France is", "Rome"))


def test_a_known_relation_has_paraphrases_and_is_no_neighbour_of_itself():
    request = ie.EditRequest("The capital of France is", "Rome")
    (capital,) = (fact for fact in world().about["France"] if fact.relation.noun == "capital")
    phrasings = {capital.relation.fill(frame, "France") for frame in capital.relation.statements}
    found = draw_paraphrases(request)
    assert len(set(found)) == 2
    assert set(found) < phrasings - {request.prompt}
    for number in range(20):  # another target, other draws
        assert not phrasings & {each.prompt for each in drawn(ie.EditRequest(request.prompt, f"town {number}"))}
    assert draw_paraphrases(ie.EditRequest("The seat of government of France is", "Rome")) == []
    assert draw_paraphrases(ie.EditRequest("The capital of Zork is", "Rome")) == []


def test_an_unknown_subject_has_facts_about_others_for_neighbours():
    found = drawn(ie.EditRequest("Zork the Great was born in", "Rome", subject="Zork the Great"), 4)
    assert [each.group for each in found] == ["other facts"] * 4
    assert drawn(ie.EditRequest("Zork", "Rome"), 0) == []


def test_a_records_own_probes_are_asked(lm):
    kinds = ("generalization", "locality", "portability")
    probes = tuple(ie.Probe(kind, f"{kind} of Peru is", ("Lima",)) for kind in kinds)
    (found,) = report_of(lm, ie.EditRecord("x", REQUESTS[0], probes)).requests
    asked = [(answer.role, answer.prompt.split()[0]) for answer in found.answers[1:]]
    assert asked == [("paraphrase", "generalization"), ("neighbour", "locality"), ("ask", "portability")]


# -- what is given -----------------------------------------------------------------------------------------------------


def test_no_request_and_no_such_editor_are_errors(lm):
    for editor, requests, said in (("ft_l", [], "no edit request"), ("ftl", REQUESTS, "did you mean 'ft_l'")):
        with pytest.raises(UserError, match=said):
            ie.edit(lm, editor, requests)
    with pytest.raises(UserError, match="must be trained first"):
        ie.edit(lm, "mend", REQUESTS)


def test_the_plain_form_is_json_of_all_but_the_edits(lm, tmp_path):
    report = report_of(lm)
    report.save_json(tmp_path / "r.json")
    plain = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert plain == report.to_dict()
    assert plain["requests"][0]["verdict"]["words"] == str(report.requests[0].verdict)
    first = plain["requests"][0]["answers"][0]
    assert first["after"]["rank"] == report.requests[0].answers[0].after.rank
    assert "edits" not in plain
    assert plain["fingerprint"] == weights_fingerprint(lm)
