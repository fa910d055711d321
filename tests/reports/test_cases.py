"""Files of requests: three formats, the names that datasets use, and errors that name file, record and field."""

import json

import pytest

from instructedit.errors import UserError
from instructedit.records import EditRequest
from instructedit.reports import EditCase, read_cases
from instructedit.reports.sequences import case_records
from instructedit.tasks import flat

RECORD = {
    "prompt": "The capital of Peru is", "target": "Lyon", "subject": "Peru", "task": "counterfact",
    "rephrase": ["Peru's capital is", "Peru is governed from"], "neighbours": "The capital of Chile is",
    "ask": ["Hi, you"],
}  # fmt: skip


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_three_formats_say_the_same(tmp_path):
    header, cells = ",".join(RECORD), []
    for value in RECORD.values():
        cells.append('"' + ("|".join(value) if isinstance(value, list) else value) + '"')
    files = [
        written(tmp_path, "a.json", json.dumps([RECORD])),
        written(tmp_path, "a.jsonl", json.dumps(RECORD) + "\n\n"),
        written(tmp_path, "a.csv", f"\ufeff{header}\r\n{','.join(cells)}\r\n\r\n"),
    ]
    ((one,), *others) = [read_cases(file) for file in files]
    assert others == [[one], [one]]
    assert (one.request.prompt, one.request.target, one.request.subject) == ("The capital of Peru is", "Lyon", "Peru")
    assert one.request.task == "counterfact"
    assert one.paraphrases == ("Peru's capital is", "Peru is governed from")
    assert (one.neighbours, one.ask) == (("The capital of Chile is",), ("Hi, you",))


def test_what_is_left_out_and_what_datasets_call_it(tmp_path):
    groups = {"Near": [{"prompt": "a", "ground_truth": [["b"]]}], "Far": [{"prompt": "c"}]}
    records = [
        {"prompt": "p", "target_new": "t", "locality": groups, "rephrase_prompt": "q", "ground_truth": "x"},
        {
            "src": "p",
            "alt": "t",
            "loc": "nq question: who",
            "loc_ans": "y",
            "slots": {"TOPIC": "tea"},
            "portability": {"New Question": "n", "New Answer": "a"},
            "pred": "z",
        },
    ]
    first, second = read_cases(written(tmp_path, "a.json", json.dumps(records)), "zsre")
    assert (first.neighbours, first.paraphrases, first.request.target) == (("a", "c"), ("q",), "t")
    assert (second.neighbours, second.ask) == (("nq question: who",), ("n",))
    assert (second.request.task, second.request.slots) == ("zsre", {"TOPIC": "tea"})
    (only,) = read_cases(written(tmp_path, "b.csv", "prompt,target,subject,ask\np,t,,\n"))
    assert (only.request.subject, only.request.task, only.ask) == (None, None, ())


@pytest.mark.parametrize(
    ("field", "name"), [(field, name) for field, names in flat.FIELDS.items() for name in names if field != "slots"]
)
def test_a_file_of_records_in_the_flat_form_is_a_file_of_requests(tmp_path, field, name):
    """Under each name that its fields have: no record that `fit` and `test` read is refused here."""
    record = {"prompt": "p", "target": "t"}
    record[name] = record.pop(field, "x")
    record |= {"locality": "x"} if field == "locality_answer" else {"portability": "x"} if "_answer" in field else {}
    (case,) = read_cases(written(tmp_path, "a.json", json.dumps([record | {"source": "NQ"}])))
    assert (case.request.prompt, case.request.target) == ("p", "t")
    shown = {"rephrase": case.paraphrases, "locality": case.neighbours, "portability": case.ask}
    assert shown.get(field, ("x",)) == ("x",)


def test_probes_may_call_their_prompt_loc_as_in_qaedit(tmp_path):
    probe = {"loc": "who", "loc_ans": "y"}
    (case,) = read_cases(written(tmp_path, "b.json", json.dumps([{"prompt": "p", "target": "t", "locality": [probe]}])))
    assert case.neighbours == ("who",)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "prompt,target\np,t\nq,\n", "record 1: field 'target' is missing"),
        ("a.csv", "prompt,target\np,t,u\n", "record 0: has 3 cells where the header has 2"),
        ("a.csv", "prompt,prompt,target\np,p,t\n", "column 'prompt' stands twice"),
        ("a.csv", 'prompt,target\n"p,t\n', "wrong CSV"),
        ("a.csv", "prompt,target\n", "no requests in it"),
        ("a.csv", "", "no requests in it"),
        ("a.csv", "prompt,target,rephrse\np,t,r\n", "record 0: unknown field 'rephrse' (did you mean 'rephrase'?)"),
        ("a.json", '[{"prompt": "p", "target": 3}]', "record 0: field 'target': expected text, got int"),
        ("a.json", '[{"prompt": "p", "target": "t", "target_new": "u"}]', "'target' and 'target_new' mean the same"),
        ("a.json", '[{"prompt": "p", "target": "t", "ask": ["x", " "]}]', "record 0: field 'ask[1]' is empty"),
        ("a.json", '[{"prompt": "p", "target": "t", "ask": [1]}]', "record 0: field 'ask[0]': expected text, got int"),
        ("a.json", '[{"prompt": "p", "target": "t", "locality": {"a": [{}]}}]', "'locality.a[0].prompt' is missing"),
        ("a.json", '{"prompt": "p"}', "expected a list of objects"),
        ("a.jsonl", '{"prompt": "p", "target": "t"}\n{"prompt": \n', "wrong JSON at line 2"),
        ("a.txt", "p t", "not a .json or .jsonl file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_its_place(tmp_path, name, text, said):
    with pytest.raises(UserError) as error:
        read_cases(written(tmp_path, name, text))
    assert said in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nothing.csv: no such file of requests"):
        read_cases(tmp_path / "nothing.csv")


def test_prompts_that_a_sequence_does_not_ask_are_counted_aloud(lm):
    request = EditRequest("The capital of France is", "Rome")
    cases = [EditCase(request, "In France it is", "Tea is", ("Where?", "Who?")), EditCase(request, ask="Why?")]
    with pytest.warns(UserWarning, match="the 3 prompts given under 'ask'"):
        records = case_records(lm, cases)
    assert [probe.kind for probe in records[0].probes] == ["generalization", "locality"]
