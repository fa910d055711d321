"""Servers and local models as writers: faults, retries, the cache, the ledger and its caps, and the key."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.writing.conftest import DROP, KEY, completion, failure

from instructedit.errors import UserError
from instructedit.writing import prompts
from instructedit.writing.clients import Local, Question, Reply, Served, Writer
from instructedit.writing.ledger import BudgetSpentError, Ledger

HELLO = Question(({"role": "user", "content": "Hello, describe something."},), "-", {"type": "object"}, 3)


def writer(server, ledger: Ledger | None = None, cache: Path | None = None, **options) -> Writer:
    return Writer.open("scripted", ledger or Ledger(50, 100_000), server.url, cache=cache, **options)


def test_a_question_is_sent_as_it_is_asked(server):
    server.script = [completion("fine")]
    assert writer(server, reply_tokens=77, temperature=0.5).ask(HELLO) == Reply("fine", None, False, 100, 50, 0)
    (request,) = server.requests
    assert (request["model"], request["seed"], request["temperature"]) == ("scripted", 3, 0.5)
    assert request["messages"] == list(HELLO.messages)
    assert request["max_completion_tokens"] == 77
    assert request["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("fault", [failure(429, "slow down"), failure(500, "oh"), failure(503, "later"), DROP])
def test_passing_faults_are_tried_again_and_counted(server, fault):
    server.script = [fault, fault, completion("fine")]
    ledger = Ledger(50, 100_000)
    assert writer(server, ledger).ask(HELLO).text == "fine"
    assert (ledger.calls, ledger.retries, ledger.tokens) == (3, 2, 150)


@pytest.mark.parametrize(
    ("fault", "words", "tries"),
    [
        (failure(429, "slow down"), r"too many requests, or no credit \(429\) in 3 tries: slow down", 3),
        (failure(500, "oh no"), r"fails with 500 in 3 tries: oh no", 3),
        (DROP, r"cannot be reached, or dropped the connection in 3 tries", 3),
        (failure(404, "no model `scripted`"), r"no model 'scripted', or no such address \(404\): no model", 1),
        (failure(401, f"the key {KEY} is wrong"), r"refuses the key in \$OPENAI_API_KEY \(401\)", 1),
        (failure(400, f"bad {KEY}\nrequest"), r"bad \*\*\* request", 1),
        (completion("x") | {"choices": []}, r"answers with something that is no chat completion", 1),
        ("<html>", r"answers with something that is no chat completion", 1),
    ],
)  # fmt: skip
def test_lasting_faults_are_one_plain_line(server, fault, words, tries):
    server.script = [fault]
    ledger = Ledger(50, 100_000)
    with pytest.raises(UserError, match=words) as caught:
        writer(server, ledger, tries=3).ask(HELLO)
    assert len(server.requests) == tries == ledger.calls
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None  # the library's error holds the request, and so the key


def test_a_server_that_is_not_there():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        ask = Writer.open("m", Ledger(9, 10_000), "http://127.0.0.1:9/v1", tries=1).ask
        with pytest.raises(UserError, match="cannot be reached"):
            ask(HELLO)


def test_a_server_that_is_too_slow(server):
    server.script = [lambda request: time.sleep(1) or completion("late")]
    with pytest.raises(UserError, match=r"no reply within 0\.2 s in 2 tries"):
        writer(server, timeout=0.2, tries=2).ask(HELLO)


@pytest.mark.parametrize("name", ["response_format", "seed", "temperature"])
def test_a_setting_that_a_server_does_not_know_is_left_out_from_then_on(server, name):
    def answer(request):
        return failure(400, f"Unsupported parameter: '{name}'", param=name) if name in request else completion("fine")

    server.script = [answer]
    asked = writer(server, temperature=1.0)
    assert [asked.ask(HELLO).text, asked.ask(HELLO).text] == ["fine", "fine"]
    assert [name in request for request in server.requests] == [True, False, False]


def test_an_older_name_of_the_limit(server):
    def answer(request):
        known = "max_tokens" in request
        return completion("fine") if known else failure(400, "unknown field max_completion_tokens")

    server.script = [answer]
    writer(server, reply_tokens=99).ask(HELLO)
    assert server.requests[-1]["max_tokens"] == 99


# -- key -----------------------------------------------------------------------------------------------------------


def test_no_key_no_question(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=r"^no key: set \$OPENAI_API_KEY"):
        writer(server)
    monkeypatch.setenv("OTHER", "k2")
    server.script = [completion("fine")]
    writer(server, key_env="OTHER").ask(HELLO)
    assert server.keys == ["Bearer k2"]


@pytest.mark.parametrize("url", ["http://me:{}@127.0.0.1/v1", "http://127.0.0.1/v1?api_key={}"])
def test_a_key_in_the_address_is_refused_and_not_repeated(server, url):
    with pytest.raises(UserError, match="a key has no place in an address") as caught:
        Served("m", url.format(KEY))
    assert KEY not in str(caught.value)


def test_the_key_is_in_no_file_log_or_message(server, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    server.script = [failure(500, KEY), completion(f"your key is {KEY}"), failure(400, f"{KEY} again")]
    ledger = Ledger.open(9, 10_000, tmp_path / "ledger.json")
    asked = writer(server, ledger, tmp_path / "cache")
    assert asked.ask(HELLO).text == "your key is ***"
    with pytest.raises(UserError) as caught:
        asked.ask(Question(HELLO.messages, "-", {}, 9))
    assert KEY in str(server.keys)  # it was sent
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    texts = [path.read_text() for path in files] + [caplog.text, *capsys.readouterr(), str(caught.value), repr(asked)]
    assert not [text for text in texts if KEY in text]


# -- cache, pace, ledger -------------------------------------------------------------------------------------------


def test_what_was_asked_before_costs_nothing(server, tmp_path):
    server.script = [completion("first"), completion("second")]
    one = writer(server, cache=tmp_path)
    assert one.ask(HELLO).text == "first"
    ledger = Ledger(50, 100_000)
    again = writer(server, ledger, tmp_path)
    assert again.ask(HELLO).text == "first"
    assert (ledger.calls, ledger.tokens, ledger.cached, len(server.requests)) == (0, 0, 1, 1)
    assert again.ask(Question(HELLO.messages, "-", {"type": "object"}, 4)).text == "second"


@pytest.mark.parametrize("change", [{"temperature": 0.3}, {"reply_tokens": 5000}])
def test_other_settings_ask_anew(server, tmp_path, change):
    server.script = [completion("first"), completion("second")]
    writer(server, cache=tmp_path).ask(HELLO)
    assert writer(server, cache=tmp_path, **change).ask(HELLO).text == "second"


def test_another_server_or_model_asks_anew(server, tmp_path):
    server.script = [completion("first"), completion("second"), completion("third")]
    assert writer(server, cache=tmp_path).ask(HELLO).text == "first"
    other = Writer.open("other", Ledger(9, 9999), server.url, cache=tmp_path)
    assert other.ask(HELLO).text == "second"
    place = Writer.open("scripted", Ledger(9, 9999), server.url.replace("/v1", "/v2"), cache=tmp_path)
    assert place.ask(HELLO).text == "third"


def test_questions_keep_their_distance(server):
    server.script = [completion("x")]
    asked = writer(server, per_minute=600)  # a tenth of a second
    start = time.monotonic()
    asked.each(lambda seed: asked.ask(Question(HELLO.messages, "-", {}, seed)), range(4))
    assert time.monotonic() - start >= 0.3  # a lower bound, which a slow machine cannot break


def test_results_of_several_at_once_stay_in_order(server):
    server.script = [lambda request: completion(str(request["seed"]))]
    asked = writer(server, concurrency=3)
    replies = asked.each(lambda seed: asked.ask(Question(HELLO.messages, "-", {}, seed)), range(7))
    assert [reply.text for reply in replies] == [str(i) for i in range(7)]
    assert asked.ledger.calls == 7


def test_no_call_beyond_the_cap(server):
    server.script = [completion("x")]
    ledger = Ledger(2, 100_000)
    asked = writer(server, ledger)
    asked.ask(HELLO)
    asked.ask(HELLO)
    with pytest.raises(BudgetSpentError, match="2 calls"):
        asked.ask(HELLO)
    assert len(server.requests) == 2


def test_retries_count_against_the_cap(server):
    server.script = [failure(500, "oh")]
    ledger = Ledger(3, 100_000)
    with pytest.raises(UserError, match="in 3 tries"):
        writer(server, ledger, tries=9).ask(HELLO)
    assert len(server.requests) == 3


def test_no_token_beyond_the_cap(server):
    server.script = [lambda request: completion("x", usage=(20, request["max_completion_tokens"]))]
    ledger = Ledger(50, 1000)
    asked = writer(server, ledger, reply_tokens=400)
    questions = [Question(HELLO.messages, "-", {}, seed) for seed in range(50)]
    with pytest.raises(BudgetSpentError):
        list(map(asked.ask, questions))
    assert 800 < ledger.tokens <= 1000
    assert server.requests[0]["max_completion_tokens"] == 400 > server.requests[-1]["max_completion_tokens"]


def test_questions_at_once_do_not_share_the_same_room():
    ledger = Ledger(10, 900)
    first = ledger.reserve(100, 400, 1)
    second = ledger.reserve(100, 400, 1)
    assert (first.reply, second.reply) == (400, 300)
    with pytest.raises(BudgetSpentError):
        ledger.reserve(10, 400, 1)
    ledger.commit(first, 1, 90, 10)
    assert ledger.reserve(100, 400, 1).reply == 300  # 900 − 100 used − 400 held − 100


def test_a_ledger_goes_on_where_it_stopped(server, tmp_path):
    server.script = [completion("x")]
    file = tmp_path / "ledger.json"
    writer(server, Ledger.open(2, 9999, file)).ask(HELLO)
    again = writer(server, Ledger.open(2, 9999, file))
    again.ask(HELLO)
    with pytest.raises(BudgetSpentError):
        again.ask(HELLO)
    assert again.ledger.counts()["prompt_tokens"] == 200


def test_tokens_that_the_server_does_not_tell_are_estimated(server):
    server.script = [completion("x" * 40, usage=None)]
    ledger = Ledger(9, 9999)
    writer(server, ledger).ask(HELLO)
    assert ledger.tokens >= (40 + len("Hello, describe something.")) / 4
    assert "estimated for 1 calls" in str(ledger)


@pytest.mark.parametrize("limit", ["tries", "concurrency", "reply_tokens", "per_minute"])
def test_limits_are_checked(server, limit):
    with pytest.raises(UserError, match=f"{limit} must be positive, got 0"):
        writer(server, **{limit: 0})


# -- the form of replies -------------------------------------------------------------------------------------------

GOOD = {"descriptions": ["one", "two"]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (completion("{not json"), "not of the form asked for"),
        (completion({"descriptions": "one"}), "descriptions: Input should be a valid array"),
        (completion({"descriptions": ["one"], "note": 1}), "note: Extra inputs are not permitted"),
        (completion('{"descriptions": ["on', finish="length"), "was cut off at the limit"),
        (completion(None, refusal="I would rather not."), "is a refusal: 'I would rather not.'"),
        (completion("", finish="content_filter"), "is a refusal: .*content filter"),
        (completion(""), "not of the form asked for"),
    ],
)
def test_a_bad_reply_is_sent_back_with_its_fault(server, bad, words):
    server.script = [bad, completion(GOOD)]
    found = prompts.asked(writer(server), HELLO, prompts.Descriptions)
    assert found.descriptions == ["one", "two"]
    assert prompts.re.search(words, server.asked[1])
    server.script = [bad]
    with pytest.raises(UserError, match=f"no usable reply in 3 attempts; the last one .*{words}"):
        prompts.asked(writer(server), HELLO, prompts.Descriptions)
    assert len(server.requests) == 5


def test_json_in_a_fence_is_json(server):
    server.script = [completion('```json\n{"descriptions": ["a"]}\n```')]
    assert prompts.asked(writer(server), HELLO, prompts.Descriptions).descriptions == ["a"]


def test_the_lines_of_a_list():
    def found(text: str, cut: bool = False) -> list[str]:
        return prompts.listed_lines(Reply(text, cut=cut))

    assert found("- First  one.\n- Second.\n\nTask: other\n- Third.") == ["First one.", "Second."]
    assert found("- First.\n- Secon", cut=True) == ["First."]
    assert found('Here are three:\n\n1. "First."\n\n2) Second.\n* 3 rivers.\nDone.\n- No.') == [
        "First.", "Second.", "3 rivers.",
    ]  # fmt: skip
    assert found("1984 is a novel.\nNo list.") == []


def test_a_local_model_continues_a_list_or_is_asked_for_one_in_its_chat_template(lm, tmp_path):
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<model> "
    lm.model.save_pretrained(tmp_path / "chats")
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "chats")
    question = replace(HELLO, listing="List two rivers.")
    sampled = []
    replies = {}
    for name in ("tiny", str(tmp_path / "chats")):
        writer = Writer.open(f"local:{name}", Ledger(9, 9999), reply_tokens=6)
        sample = writer.model.lm.sample

        def watched(prompts, *args, lm=writer.model.lm, sample=sample, **options):
            sampled.append(lm.text.tokenizer.decode(lm.text.prompts(prompts)[0]))
            return sample(prompts, *args, **options)

        writer.model.lm.sample = watched
        replies[name] = writer.ask(question)
    assert sampled == [HELLO.start, "<user> List two rivers. <model> "]
    first, second = replies.values()
    assert first.text.startswith("-")
    assert (first.prompt_tokens, second.prompt_tokens) == tuple(len(lm.token_ids(text)) for text in sampled)


def test_a_local_model_refuses_the_temperature_that_it_cannot_have(lm):
    with pytest.raises(UserError, match="temperature above 0"):
        Writer(Local(lm, temperature=0.0), Ledger(9, 9999), reply_tokens=4).ask(HELLO)
