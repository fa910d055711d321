"""What stands between a prompt and its answer."""

import pytest

from instructedit.lm.joining import joiner


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("The capital is", "Rome", " "),
        ("Who?", "Rome", " "),
        ("Q: Who?\nA:\n", "Rome", ""),
        ('He said "', "no", ""),
        ("He said “", "no", ""),
        ("sie sagt „", "nein", ""),
        ("dit «", "non", ""),
        ("of Rome (", "Italy", ""),
        ("x = [", "1", ""),
        ('He said "no"', "and", " "),
        ("He said “no”", "and", " "),
        ("It is Rome's", "river", " "),
        ("the dogs'", "owner", " "),
        ('("', "a", ""),
        ("法国的首都是", "巴黎", ""),
        ("フランスの首都は", "パリ", ""),
        ("法国的首都是：", "Paris", ""),
        ("他说「", "不", ""),
        ("iPhone 在 2020", "年", ""),
        ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", ""),
        ("ປາຣີ", "ເມືອງ", ""),
        ("ភ្នំពេញ", "ជា", ""),
        ("မြန်မာ", "နိုင်ငံ", ""),
        ("프랑스의 수도는", "파리", " "),
        ("Столица Франции", "Париж", " "),
        ("عاصمة فرنسا هي", "باريس", " "),
        ("The capital of China is", "北京", " "),
        ("Rome", ", of course", ""),
        ("(Rome", ") it is", ""),
        ("The framework is", ".NET", " "),
        ("It costs", "$5", " "),
        ("It is", "(very) old", " "),
        ("He asked for", '"more"', " "),
        ("It fell to", "-5", " "),
        ("", "Rome", ""),
    ],
)
def test_a_space_stands_where_writers_put_one(prompt, answer, expected):
    assert joiner(prompt, answer) == expected
