"""The pure metrics: hand-worked examples, and slow loops over padded rows as an independent reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instructedit.metrics import (
    agreement,
    answer_match,
    convsent_edit_success,
    exact_match,
    fluency,
    log_likelihood,
    ngram_entropy,
    row_mean,
    token_accuracy,
)

PAD = -100
VOCAB = 4


def flattened(padded: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [positions] and rows [positions] of padded tokens."""
    kept = [(token, row) for row, tokens in enumerate(padded) for token in tokens if token != PAD]
    tokens, rows = zip(*kept, strict=True) if kept else ((), ())
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64)


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Labels and predictions, padded on the right with PAD to one length; some rows are empty."""
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    width = max(lengths)
    token = st.integers(0, VOCAB - 1)

    def rows() -> list[list[int]]:
        return [[draw(token) for _ in range(length)] + [PAD] * (width - length) for length in lengths]

    return rows(), rows()


def slow_shares(labels: list[list[int]], predicted: list[list[int]]) -> list[float]:
    shares = []
    for wanted, given_ in zip(labels, predicted, strict=True):
        right = total = 0
        for label, token in zip(wanted, given_, strict=True):
            if label != PAD:
                total += 1
                right += label == token
        shares.append(right / total if total else math.nan)
    return shares


def test_row_mean_by_hand() -> None:
    means = row_mean(torch.tensor([1.0, 10.0, 3.0, 20.0]), torch.tensor([0, 2, 0, 2]), 4)
    torch.testing.assert_close(means, torch.tensor([2.0, math.nan, 15.0, math.nan]), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bool, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_row_mean_is_never_computed_in_half_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    ones = torch.ones(1000, dtype=dtype)
    means = row_mean(ones, torch.zeros(1000, dtype=torch.int64), 1)
    assert means.dtype == expected
    assert means.tolist() == [1.0]


def test_row_mean_passes_the_gradient_and_refuses_unknown_rows() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    row_mean(values, torch.tensor([0, 0, 1]), 2).sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.5, 0.5, 1.0]))
    with pytest.raises((IndexError, RuntimeError)):
        row_mean(torch.ones(1), torch.tensor([3]), 2)


def test_accuracy_exact_match_and_agreement_by_hand() -> None:
    # Row 0: 2 of 3 right; row 1: all right; row 2: none right; row 3: no positions.
    labels, predicted = torch.tensor([7, 8, 9, 1, 5]), torch.tensor([7, 8, 0, 1, 6])
    rows = torch.tensor([0, 0, 0, 1, 2])
    shares = torch.tensor([2 / 3, 1.0, 0.0, math.nan])
    torch.testing.assert_close(token_accuracy(predicted, labels, rows, 4), shares, equal_nan=True)
    torch.testing.assert_close(agreement(predicted, labels, rows, 4), shares, equal_nan=True)
    torch.testing.assert_close(
        exact_match(predicted, labels, rows, 4), torch.tensor([0.0, 1.0, 0.0, math.nan]), equal_nan=True
    )


@settings(max_examples=50, deadline=None)
@given(padded_batches())
def test_shares_equal_loops_over_padded_rows(batch: tuple[list[list[int]], list[list[int]]]) -> None:
    padded_labels, padded_predictions = batch
    (labels, rows), (predicted, _) = flattened(padded_labels), flattened(padded_predictions)
    shares = slow_shares(padded_labels, padded_predictions)
    exact = [share if math.isnan(share) else float(share == 1) for share in shares]
    for metric, expected in ((token_accuracy, shares), (agreement, shares), (exact_match, exact)):
        got = metric(predicted, labels, rows, len(shares))
        torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(padded_batches(), st.integers(0, 1000))
def test_log_likelihood_equals_loops_over_padded_rows(
    batch: tuple[list[list[int]], list[list[int]]], seed: int
) -> None:
    padded, _ = batch
    labels, rows = flattened(padded)
    padded_logits = torch.randn(len(padded), len(padded[0]), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    expected = []
    for tokens, scores in zip(padded, padded_logits.tolist(), strict=True):
        terms = [
            score[token] - math.log(sum(math.exp(s) for s in score))
            for token, score in zip(tokens, scores, strict=True)
            if token != PAD
        ]
        expected.append(sum(terms) / len(terms) if terms else math.nan)
    logits = padded_logits[torch.tensor(padded).reshape(padded_logits.shape[:2]) != PAD]
    got = log_likelihood(logits, labels, rows, len(padded))
    torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_log_likelihood_by_hand_in_float32_and_without_padding_labels() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    rows = torch.tensor([0, 0])
    got = log_likelihood(logits, torch.tensor([1, 0]), rows, 1)
    torch.testing.assert_close(got, torch.tensor([(math.log(3 / 4) + math.log(1 / 2)) / 2]))
    assert log_likelihood(logits.bfloat16(), torch.tensor([1, 0]), rows, 1).dtype == torch.float32
    with pytest.raises(RuntimeError):
        log_likelihood(logits, torch.tensor([1, PAD]), rows, 1)


def test_convsent_edit_success_by_hand() -> None:
    before = torch.tensor([-2.0, -2.0, -2.0, -900.0])
    wanted = torch.tensor([-2.0, -3.0, -1.0, -1.0])
    opposite = torch.tensor([-2.0, -3.0 - math.log(3.0), -1.0, -1.0])
    success, sentiment, topic = convsent_edit_success(before, wanted, opposite)
    torch.testing.assert_close(sentiment, torch.tensor([0.5, 0.75, 0.5, 0.5]))  # sigmoid(log 3) = 3/4
    torch.testing.assert_close(topic, torch.tensor([1.0, math.exp(-1.0), 1.0, 1.0]))  # never above 1
    torch.testing.assert_close(success, sentiment * topic)


def test_ngram_entropy_by_hand() -> None:
    assert ngram_entropy("a b c d e", 2) == 2.0  # four different bigrams
    assert ngram_entropy("a a a a", 2) == 0.0  # one bigram, three times
    assert ngram_entropy("a b a b a", 1) == pytest.approx(-(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4)))
    assert ngram_entropy("It's, well-known.", 1) == 2.0  # It's | , | well-known | .
    assert ngram_entropy("A a", 1) == 1.0  # case counts


@pytest.mark.parametrize("text", ["", "   ", "one", "two words"])
def test_text_without_ngrams_has_no_entropy(text: str) -> None:
    assert ngram_entropy(text, 3) == 0.0
    assert fluency("one") == 0.0


def test_fluency_is_about_600_for_varied_text_and_low_for_repetition() -> None:
    words = [f"word{i * i % 61}" for i in range(100)]  # some bigrams come again, as in real text
    assert 450 < fluency(" ".join(words)) < 662  # 662: all n-grams of 100 words different
    assert fluency(" ".join(f"word{i}" for i in range(100))) == pytest.approx(
        100 * (2 / 3 * math.log2(99) + 4 / 3 * math.log2(98)) / 2
    )
    assert fluency("again and " * 50) < 110


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 3))
def test_ngram_entropy_equals_a_slow_count(words: list[str], n: int) -> None:
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    shares = [grams.count(gram) / len(grams) for gram in set(grams)]
    assert ngram_entropy(" ".join(words), n) == pytest.approx(-sum(share * math.log2(share) for share in shares))


@pytest.mark.parametrize(
    ("generated", "answers"),
    [
        ("Lyon", ["Lyon"]),
        (" lyon.\nThe capital of", ["Lyon"]),
        ('"Lyon". It is a city.', ["Lyon"]),
        ('"Lyon." It is a city.', ["Lyon"]),
        ("Lyon! No, Paris.", ["Lyon"]),
        ("J. R. R. Tolkien.", ["J. R. R. Tolkien"]),
        ("J. R. R. Tolkien. He was born in", ["J. R. R. Tolkien"]),
        ("St. Louis", ["St. Louis"]),
        ("St. Louis. It lies", ["Paris", "St. Louis"]),
        ("Washington, D.C. is", ["Washington, D.C."]),
        ("New   York", ["new york"]),
        ("Sa\u0303o Paulo", ["S\u00e3o Paulo"]),
        ("!!!", ["!!!"]),
    ],
)
def test_answer_match(generated: str, answers: list[str]) -> None:
    assert answer_match(generated, answers)


@pytest.mark.parametrize(
    ("generated", "answers"),
    [
        ("Lyon is nice", ["Lyon"]),
        ("Lyon, France", ["Lyon"]),
        ("Lyonnais", ["Lyon"]),
        ("The answer is Lyon.", ["Lyon"]),
        ("Paris. Lyon.", ["Lyon"]),
        ("\nLyon", ["Lyon"]),
        ("Paris\nLyon", ["Lyon"]),
        ("", ["Lyon"]),
        ("...", ["!!!"]),
        ("C", ["C++"]),
        ("5", ["-5"]),
        ("3.5", ["3"]),
        ("Lyon", []),
    ],
)
def test_no_answer_match(generated: str, answers: list[str]) -> None:
    assert not answer_match(generated, answers)


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("aB. !'é"), min_size=1).filter(str.strip), st.sampled_from(["", ".", "\nmore"]))
def test_an_answer_matches_itself_whatever_it_holds(answer: str, rest: str) -> None:
    assert answer_match(answer + rest if any(map(str.isalnum, answer)) else answer, [answer])
