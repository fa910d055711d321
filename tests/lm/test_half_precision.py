"""The warning about half precision on a CPU that is slow in it: when it comes, and when it does not."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from instructedit.lm import FrozenLM, half_precision


def warnings_of(dtype):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FrozenLM.from_pretrained("tiny", dtype=dtype)
    return [str(one.message) for one in caught if "times as long" in str(one.message)]


@pytest.fixture
def slow(monkeypatch):
    """The embedded model counts as large, and half precision as eight times as slow."""
    monkeypatch.setattr(half_precision, "LARGE", 1_000_000)
    monkeypatch.setattr(half_precision, "slowdown", lambda dtype: 8.1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_a_large_model_on_a_slow_cpu_says_so(slow):
    assert warnings_of("bfloat16") == ["model 'tiny': bfloat16 takes 8 times as long as float32 on this CPU"]
    assert warnings_of("float32") == []


def test_no_warning_without_need(slow, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(half_precision, "slowdown", lambda dtype: 1.2)
        assert warnings_of("float16") == []
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        assert warnings_of("float16") == []
    monkeypatch.setattr(half_precision, "LARGE", 50_000_000)
    assert warnings_of("float16") == []


def test_the_slowdown_is_the_time_over_that_of_float32(monkeypatch):
    monkeypatch.setattr(half_precision, "_seconds", {torch.bfloat16: 0.4, torch.float32: 0.1}.get)
    assert half_precision.slowdown(torch.bfloat16) == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_measure_is_a_ratio(dtype):
    found = half_precision.slowdown(dtype)
    assert math.isfinite(found)
    assert found > 0
