"""How far a fit is, in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from instructedit.callbacks import pace


def test_a_fit_says_now_and_then_how_far_it_is(monkeypatch):
    clock, said = [100.0], []
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pace, "rank_zero_info", said.append)
    monkeypatch.setattr(pace.sys.stdout, "isatty", lambda: False, raising=False)
    trainer = SimpleNamespace(global_step=100, max_steps=300, callback_metrics={})
    callback = pace.Pace(every=60)
    callback.on_train_start(trainer, None)
    for step, seconds in ((101, 59.0), (120, 61.0), (121, 62.0), (200, 200.0)):  # resumed at 100
        trainer.global_step, clock[0] = step, 100.0 + seconds
        if step == 200:
            trainer.callback_metrics["val/score"] = torch.tensor(93.14)
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert said == ["step 120 of 300, about 9 min left", "step 200 of 300, about 3 min left, val/score 93.1"]
    silent = pace.Pace(every=0)
    silent.on_train_start(trainer, None)
    clock[0] += 1000
    silent.on_train_batch_end(trainer, None, None, None, 0)
    assert len(said) == 2


@pytest.mark.parametrize("several", [False, True])
def test_a_test_says_how_many_records_are_through(several, monkeypatch):
    clock, said = [5.0], []
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pace, "rank_zero_info", said.append)
    monkeypatch.setattr(pace.sys.stdout, "isatty", lambda: False, raising=False)
    loader = SimpleNamespace(dataset=range(80))
    trainer = SimpleNamespace(test_dataloaders=[loader, loader] if several else loader)
    callback = pace.Pace(every=60)
    callback.on_test_start(trainer, None)
    for seconds in (30.0, 90.0, 100.0):
        clock[0] = 5.0 + seconds
        callback.on_test_batch_end(trainer, None, None, [None] * 20, 0)
    assert said == [f"tested 40 of {160 if several else 80} records, about {4 if several else 2} min left"]


def test_durations_in_words():
    words = {
        20: "less than a minute left",
        90: "about 2 min left",
        3600: "about 1 h left",
        7800: "about 2 h 10 min left",
    }
    assert {seconds: pace.time_left(seconds) for seconds in words} == words
