"""Scores against merged dense models, one record, one probe and one answer at a time."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import (
    answer_logits,
    assert_untouched,
    dense,
    dense_copy,
    footprint,
    greedy,
    plain_model,
    random_factors,
    tokens,
)

from instructedit.editors import Editor, build_editor
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.evaluation import Evaluation, evaluate, evaluate_batch
from instructedit.evaluation.passes import chunks
from instructedit.evaluation.questions import questions
from instructedit.instructions import render_records
from instructedit.metrics import answer_match
from instructedit.records import EditRecord, EditRequest, Probe

QUICK = Evaluation(generate=False, fluency_tokens=0)
KINDS = ("wanted", "opposite")
#: What the edited models of each shape know: it takes seconds to find out, and the weights are the same each time.
WORDS: dict[str, list[list[tuple[str, str]]]] = {}
SLOTS = {"LABEL": "positive", "TOPIC": "cats"}


class Given(Editor):
    """Makes the edits that it was given for each record, and keeps what it was asked. (Without a name: in no registry.)

    Records come in any order: the engine edits together what is of one length.
    """

    def __init__(self, factors=None, records=(), instructions=False):
        super().__init__(instructions)
        self.factors, self.known, self.asked = factors, [record.request for record in records], {}

    def compute_edit(self, batch):
        chosen = [next(i for i, known in enumerate(self.known) if known is request) for request in batch.requests]
        assert not self.asked.keys() & set(chosen)
        self.asked |= dict(zip(chosen, batch.prompts, strict=True))
        return LowRankEdit({name: Factors(a[chosen], b[chosen]) for name, (a, b) in self.factors.items()})


@pytest.fixture
def factors(lm):
    return random_factors(lm.select(blocks=[2, 3]), 4, 2, scale=0.02)


@pytest.fixture
def models(lm, factors):
    """The dense edited model of each record."""
    return [dense_copy(lm, dense(factors, i)) for i in range(4)]


@pytest.fixture
def records(lm, models):
    """Two facts and two cases of one topic; answers are such that right, wrong and half right all occur."""
    if lm.name not in WORDS:
        WORDS[lm.name] = [known_words(model, lm.tokenizer) for model in models]
    right = WORDS[lm.name]

    def fact(i):
        (ask, word), (again, other), (hop, far) = right[i]
        probes = (
            Probe("generalization", again, ("nothing", other, "no")),
            Probe("portability", hop, (f"{far} and more",), "one_hop"),
            Probe("locality", "A long way to", ("the sea of the north",), "near"),
            Probe("locality", "He was", ("a man of many words", "he")),
        )
        target = word if i == 0 else "a river"
        return EditRecord(f"f{i}", EditRequest(ask, target, task="counterfact"), probes)

    def topic(i):
        (ask, word), (other, reply) = right[i][:2]
        probes = (
            Probe("wanted", other, (f"{reply} good",)),
            Probe("wanted", "What of it", ("very good",)),
            Probe("opposite", other, ("bad",)),
            Probe("locality", "A dog", ("is here to stay",)),
        )
        request = EditRequest(ask, word if i == 2 else "so", task="convsent", slots=SLOTS)
        return EditRecord(f"c{i}", request, probes, cluster="one topic")

    return [fact(0), fact(1), topic(2), topic(3)]


def known_words(model, tokenizer):
    """Three (prompt, word): prompts that the model continues with one whole word."""
    asked = ((f"{a}{b}", greedy(model, tokenizer, f"{a}{b}", 1)) for a in "ABCDEFGHIJKLMNOP" for b in "aeiou")
    said = ((prompt, tokenizer.decode(ids)) for prompt, ids in asked)
    whole = ((prompt, word[1:]) for prompt, word in said if word[:1] == " " and word[1:].isalpha())
    return list(itertools.islice(whole, 3))


def expected_scores(lm, model, prompt, answers):
    """Accuracy, exact match and log-likelihood of the best answer, and agreement with the unedited model."""
    best = None
    for answer in answers:
        wanted = torch.tensor(tokens(lm.tokenizer, prompt, answer)[1])
        lone = int(lm.tokenizer.decode(wanted[:1]) == " ")  # a space piece of its own is no part of the answer
        wanted = wanted[lone:]
        with torch.no_grad():
            said, was = (answer_logits(m, lm.tokenizer, prompt, answer)[lone:] for m in (model, lm.model))
        hits = (said.argmax(-1) == wanted).float()
        log_p = [part.log_softmax(-1)[torch.arange(len(wanted)), wanted].mean().item() for part in (said, was)]
        scores = {
            "exact": float(hits.all()), "accuracy": hits.mean().item(), "answer": answer,
            "agreement": (said.argmax(-1) == was.argmax(-1)).float().mean().item(),
            "log_likelihood": log_p[0], "log_likelihood_before": log_p[1],
        }  # fmt: skip
        if best is None or (scores["exact"], scores["accuracy"]) > (best["exact"], best["accuracy"]):
            best = scores
    return best


def assert_scored(lm, models, records, table):
    ids = [record.id for record in records]
    for row in table.to_dict("records"):
        record = records[ids.index(row["record"])]
        probe = ((record.reliability, *record.probes))[row["probe"]]
        answers = probe.answers[:1] if probe.kind == "locality" else probe.answers
        assert row["prompt"].endswith(probe.prompt)
        for name, value in expected_scores(lm, models[ids.index(record.id)], row["prompt"], answers).items():
            assert row[name] == (value if name == "answer" else pytest.approx(value, abs=1e-4)), (row, name)


@pytest.mark.parametrize(("batch_size", "tokens"), [(32, 8192), (3, 60), (1, 1)])
def test_every_probe_scores_as_under_its_merged_model(lm, factors, models, records, batch_size, tokens):
    settings = Evaluation(generate=False, fluency_tokens=0, tokens=tokens)
    table = evaluate(lm, Given(factors, records).bind(lm), records, settings, batch_size).table
    assert len(table) == 2 * 5 + 2 * 5
    assert_scored(lm, models, records, table)
    assert 0 < table["accuracy"].mean() < 1  # not all alike
    assert 0 < table["agreement"].mean() < 1
    assert set(table["view"]) == {"plain"}


def test_summary_is_the_mean_over_probes_then_records_then_clusters(lm, factors, models, records):
    summary = evaluate(lm, Given(factors, records).bind(lm), records, QUICK).summary.set_index(["task", "metric"])[
        "mean"
    ]
    expected = {}
    for i, record in enumerate(records):
        for kind in ("reliability", "generalization", "portability", "locality"):
            column = "agreement" if kind == "locality" else "accuracy"
            chosen = [p for p in (record.reliability, *record.probes) if p.kind == kind]
            answers = [p.answers[:1] if kind == "locality" else p.answers for p in chosen]
            pairs = zip(chosen, answers, strict=True)
            scores = [expected_scores(lm, models[i], p.prompt, given)[column] for p, given in pairs]
            if scores:
                expected.setdefault((record.task, kind), []).append(100 * sum(scores) / len(scores))
    assert len(expected) == 6
    for key, values in expected.items():
        assert summary[key] == pytest.approx(sum(values) / len(values), abs=1e-3), key
    assert summary["counterfact", "reliability.exact"] == 50
    assert summary["counterfact", "generalization"] == 100  # by the second of three answers


def test_cases_of_a_cluster_count_as_one(lm, factors, records):
    request = EditRequest(records[0].request.prompt, "no", task="convsent", slots=SLOTS)
    alone = EditRecord("alone", request, records[2].probes)
    chosen, four = [records[2], records[3], alone], {n: tuple(f[[2, 3, 0]] for f in p) for n, p in factors.items()}
    scores = evaluate(lm, Given(four, chosen).bind(lm), chosen, QUICK)
    kinds = scores.table[scores.table["kind"] == "reliability"].set_index("record")["accuracy"]
    row = scores.summary.set_index("metric").loc["reliability"]
    assert row["mean"] == pytest.approx(100 * ((kinds["c2"] + kinds["c3"]) / 2 + kinds["alone"]) / 2, abs=1e-3)
    assert row["n"] == 2
    assert kinds["c2"] != kinds["c3"]


def test_edit_success_of_replies(lm, factors, models, records):
    scores = evaluate(lm, Given(factors, records).bind(lm), records, QUICK).summary.set_index("metric")["mean"]
    found = []
    for i in (2, 3):
        after = {k: [expected_scores(lm, models[i], p.prompt, p.answers) for p in records[i].of(k)] for k in KINDS}
        wanted, opposite = ([s["log_likelihood"] for s in after[kind]] for kind in KINDS)
        before = torch.tensor([s["log_likelihood_before"] for s in after["wanted"]]).mean()
        wanted, opposite = torch.tensor(wanted).mean(), torch.tensor(opposite).mean()
        sentiment, topic = torch.sigmoid(wanted - opposite), (wanted - before).exp().clamp(max=1)
        found.append((sentiment * topic, sentiment, topic))
    for name, values in zip(("success", "success.sentiment", "success.topic"), zip(*found, strict=True), strict=True):
        assert scores[name] == pytest.approx(100 * sum(values).item() / 2, abs=1e-2), name


def test_instructions_give_two_views(lm, factors, models, records):
    editor = Given(factors, records, instructions=True).bind(lm)
    table = evaluate(lm, editor, records, QUICK).table
    assert_scored(lm, models, records, table)
    views = table.groupby("kind")["view"].agg(lambda view: sorted(set(view)))
    both, plain, instructed = ["instructed", "plain"], ["plain"], ["instructed"]
    assert views.to_dict() == {
        "reliability": both, "generalization": both, "portability": both, "locality": plain,
        "wanted": instructed, "opposite": instructed,
    }  # fmt: skip
    assert (table["main"] == ((table["view"] == "instructed") | (table["kind"] == "locality"))).all()
    assert (table["prompt"].str.startswith("Task: ") == (table["view"] == "instructed")).all()
    rows = table[(table["kind"] == "reliability") & table["main"]]
    assert rows["prompt"].tolist() == [
        editor.asked[i] for i in range(4)
    ]  # scored behind the very instruction that it was edited with


def test_nothing_changes_without_an_edit(lm, records):
    scores = evaluate(lm, build_editor("unedited", lm), records, QUICK)
    assert (scores.table["agreement"] == 1).all()
    assert (scores.table["log_likelihood"] == scores.table["log_likelihood_before"]).all()
    assert scores.summary.set_index("metric")["mean"]["locality"].tolist() == [100, 100]
    assert set(scores.summary["method"]) == {"unedited"}


@pytest.mark.parametrize("tokens", [8192, 60])
def test_words_before_and_after(lm, factors, models, records, tokens):
    table = evaluate(lm, Given(factors, records).bind(lm), records, Evaluation(fluency_tokens=0, tokens=tokens)).table
    spoken = table[table["task"] == "counterfact"]
    for row in spoken[spoken["kind"] != "locality"].to_dict("records"):
        model = models[int(row["record"][1])]
        for column, speaker in (("after", model), ("before", plain_model(lm))):
            if column == "after" or row["kind"] == "reliability":
                words = lm.tokenizer.decode(greedy(speaker, lm.tokenizer, row["prompt"], 40))
                assert row[column]
                assert words.startswith(row[column])
        assert row["generated"] == answer_match(row["after"], row["aliases"])
    assert spoken[spoken["kind"] == "locality"]["after"].isna().all()
    assert table[table["task"] == "convsent"]["generated"].isna().all()  # replies have no one right wording


def test_fluency_is_sampled_from_replies_and_leaves_the_random_state(lm, factors, records):
    settings, state = Evaluation(generate=False, fluency_tokens=12, seed=3), torch.get_rng_state()
    first, second = (evaluate(lm, Given(factors, records).bind(lm), records, settings).table for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    rows = first[first["kind"] == "fluency"]
    assert rows["record"].tolist() == ["c2", "c3"]
    assert rows["after"].tolist() == second[second["kind"] == "fluency"]["after"].tolist()
    assert all(len(lm.tokenizer(text)["input_ids"]) >= 6 for text in rows["after"])
    # what a record says depends on no record beside it
    alone = evaluate(lm, Given(factors, records).bind(lm), records, replace(settings, tokens=1), batch_size=1).table
    assert alone[alone["kind"] == "fluency"]["after"].tolist() == rows["after"].tolist()
    other = evaluate(lm, Given(factors, records).bind(lm), records, replace(settings, seed=4)).table
    assert (other[other["kind"] == "fluency"]["after"].to_numpy() != rows["after"].to_numpy()).all()


@pytest.mark.filterwarnings("ignore:some prompts are longer")
def test_a_long_prompt_shortens_no_other_records_text(lm, factors, records):
    settings = Evaluation(generate=False, fluency_tokens=12)
    c2 = next(record for record in records if record.id == "c2")
    long = replace(c2, id="long", request=replace(c2.request, prompt="The city of " * 40))
    texts = []
    for asked in ([c2], [c2, long]):
        rows = evaluate(lm, Given(factors, asked).bind(lm), asked, settings).table
        texts.append(rows.loc[(rows["kind"] == "fluency") & (rows["record"] == "c2"), "after"].item())
    assert texts[0] == texts[1]


def test_replies_are_counted_one_by_one():
    probes = [Probe("wanted", "How is tea?", (answer,)) for answer in ("Good.", "Fine.", "Good.")]
    record = EditRecord("c", EditRequest("How is tea?", "Good.", task="convsent"), tuple(probes))
    asked = questions(render_records([record], None), replies=2)
    assert [question.answer for question in asked if question.probe.kind == "wanted"] == ["Good.", "Fine."]


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_a_record_at_least(lm, factors, records, size):
    with pytest.raises(UserError, match=f"batch_size must be at least 1, got {size}"):
        evaluate(lm, Given(factors, records).bind(lm), records, QUICK, batch_size=size)


def test_what_the_unedited_model_says_is_asked_once(lm, factors, records, monkeypatch):
    asked, generate = [], lm.generate
    monkeypatch.setattr(lm, "generate", lambda prompts, *a: (asked.append(len(prompts)), generate(prompts, *a))[1])
    settings = Evaluation(fluency_tokens=0)
    first = evaluate(lm, Given(factors, records).bind(lm), records, settings).table
    before, known = sum(asked), first["before"].notna().sum()
    asked.clear()
    assert evaluate(lm, Given(factors, records).bind(lm), records, settings).table.equals(first)
    assert 0 < known == before - sum(asked)
    asked.clear()
    lm.cache.clear()
    evaluate(lm, Given(factors, records).bind(lm), records, settings)
    assert sum(asked) == before


@pytest.mark.parametrize(("kv_dtype", "rows"), [("float32", [1, 1]), ("float16", [2])])
def test_half_the_keys_and_values_let_twice_the_rows_speak(lm, factors, records, kv_dtype, rows, monkeypatch):
    spoken, sample = [], lm.sample
    monkeypatch.setattr(
        lm, "sample", lambda p, *a, **k: (spoken.append((len(p), k["kv_dtype"])), sample(p, *a, **k))[1]
    )
    settings = Evaluation(generate=False, fluency_tokens=30, kv_dtype=kv_dtype)
    one = max(len(lm.tokenizer(r.request.prompt)["input_ids"]) for r in records) + 30 + lm.generation.row_tokens
    evaluate(lm, Given(factors, records).bind(lm), records, replace(settings, tokens=one + one % 2))
    assert spoken == [(count, kv_dtype) for count in rows]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_evaluation_works_in_any_mode_and_leaves_no_trace(lm, records, mode, training):
    editor = build_editor("mend", lm, rank=4, edit_rate=0.05).train(training)
    expected = evaluate(lm, editor, records, QUICK).table
    lm.cache.clear()
    before, own = footprint(lm), {name: t.clone() for name, t in editor.state_dict().items()}
    with mode():
        found = evaluate(lm, editor, records, QUICK).table
    assert found.equals(expected)
    assert_untouched(lm, before)
    assert all(torch.equal(t, own[name]) for name, t in editor.state_dict().items())
    assert editor.training is training
    # what was cached in inference mode can still be trained on
    assert (
        editor.train()
        .compute_edit(editor.requests([records[0].request], None))
        .delta(editor.sites[0].name)
        .requires_grad
    )


def test_records_that_share_an_id_are_refused(lm):
    editor = build_editor("unedited", lm)
    first, second = (EditRecord("a", EditRequest("A", target)) for target in ("b", "c"))
    with pytest.raises(UserError, match="evaluate: two records of task 'edit' have the id 'a'"):
        evaluate(lm, editor, [first, second], QUICK)
    other = EditRecord("a", EditRequest("A", "c", task="recent"))
    assert len(evaluate(lm, editor, [first, other], QUICK).table) == 2


def test_an_error_restores_training_mode(lm):
    editor = build_editor("mend", lm, rank=4).train()
    with pytest.raises(UserError, match="record f9"):
        evaluate(lm, editor, [EditRecord("f9", EditRequest("A", "very " * 200))], QUICK)
    assert editor.training


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=30), tokens=st.integers(1, 200)
)  # fmt: skip
def test_no_pass_has_more_tokens_than_it_may(lengths, tokens):
    found = list(chunks(lengths, tokens))
    assert sorted(i for chunk in found for i in chunk) == list(range(len(lengths)))
    for chunk in found:
        padded = len(chunk) * sum(max(lengths[i][part] for i in chunk) for part in (0, 1))
        assert padded <= tokens or len(chunk) == 1


@pytest.mark.parametrize("tokens", [80, 200])
def test_requests_take_half_of_the_tokens_of_a_pass(lm, factors, records, tokens, monkeypatch):
    made, make = [], Given.compute_edit
    monkeypatch.setattr(Given, "compute_edit", lambda self, batch: made.append(batch.tokens) or make(self, batch))
    settings = Evaluation(generate=False, fluency_tokens=0, tokens=tokens)
    evaluate_batch(lm, Given(factors, records).bind(lm), records, settings)
    assert sum(map(len, made)) == 4
    assert max(map(len, made)) > 1
    assert all(batch.input_ids.numel() <= tokens // 2 for batch in made)


def test_edits_are_shown_while_they_live(lm, factors, records):
    seen = []
    settings = Evaluation(generate=False, fluency_tokens=0, tokens=1)
    evaluate_batch(lm, Given(factors, records).bind(lm), records, settings, [lambda *shown: seen.append(shown)])
    assert {record.id for shown, _ in seen for record in shown} == {record.id for record in records}
    for shown, edit in seen:
        assert len(shown) == len(edit) == 1  # a token budget that no request fits in
        number = records.index(shown[0])
        for site, (a, _) in factors.items():
            assert torch.equal(edit.factors[site].a[0], a[number])
