"""Descent of many requests at once against a plain loop of one request and one optimiser."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.optimization import Adafactor

from instructedit.editors.optimisation import OPTIMIZERS, optimise
from instructedit.errors import UserError

#: Shapes of one request's values: a matrix (which Adafactor factorises), a vector and a number.
SHAPES = {"matrix": (3, 4), "vector": (5,), "number": ()}


def start_of(n, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, *shape, generator=rng) * scale for name, shape in SHAPES.items()}


def bowl(values, number):
    """The loss of one request: neither symmetric nor quadratic, its minimum another for each."""
    matrix, vector, number_ = values["matrix"], values["vector"], values["number"]
    rows = torch.arange(12.0).reshape(3, 4) / 7 - number / 3
    crossed = (matrix @ matrix.T).sum() * 0.02  # so that the elements meet
    return ((matrix - rows) ** 2).mean() + crossed**2 + (vector + number).cosh().log().mean() + (number_ - 2) ** 2


def bowls(values, active):
    rows = [{name: value[k] for name, value in values.items()} for k in range(len(active))]
    return torch.stack([bowl(row, number) for row, number in zip(rows, active.tolist(), strict=True)])


def by_hand(start, number, steps, lr, optimizer, decay=0.0, stop=0.0, project=None):
    """One request alone: its own loop, and torch's or transformers' optimiser."""
    own = {name: value[number].clone().requires_grad_() for name, value in start.items()}
    if optimizer == "adam":
        method = torch.optim.AdamW(own.values(), lr=lr, weight_decay=decay)
    else:
        method = Adafactor(
            own.values(), lr=lr, weight_decay=decay, scale_parameter=False, relative_step=False, warmup_init=False
        )
    taken = 0
    for _ in range(steps):
        loss = bowl(own, number)
        if loss.item() < stop:
            break
        method.zero_grad()
        loss.backward()
        method.step()
        taken += 1
        if project:
            with torch.no_grad():
                project(own)
    return {name: value.detach() for name, value in own.items()}, taken


def assert_same(found, expected, number):
    for name, value in expected.items():
        torch.testing.assert_close(found[name][number], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
@given(
    n=st.integers(1, 4), steps=st.integers(0, 12), lr=st.floats(1e-3, 0.5), decay=st.sampled_from([0.0, 0.1]),
    stop=st.sampled_from([0.0, 1.0, 3.0, 6.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_many_requests_end_where_each_ends_alone(optimizer, n, steps, lr, decay, stop, seed):
    start = start_of(n, seed)
    kept = {name: value.clone() for name, value in start.items()}
    found = optimise(start, bowls, steps, lr, optimizer, weight_decay=decay, stop_below=stop)
    assert found.keys() == start.keys()
    assert all(torch.equal(start[name], kept[name]) for name in start)
    assert not any(value.requires_grad for value in found.values())
    for number in range(n):
        expected, _ = by_hand(start, number, steps, lr, optimizer, decay, stop)
        assert_same(found, expected, number)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_it_goes_down_also_where_gradients_are_off(optimizer):
    start = start_of(3)
    with torch.no_grad():
        found = optimise(start, bowls, 200, 0.02, optimizer)
        before, after = (bowls(values, torch.arange(3)) for values in (start, found))
    assert (after < 0.6 * before).all()


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_request_that_is_good_enough_stays_where_it_is_while_others_go_on(optimizer):
    """Also under weight decay and with the optimiser's momentum, both of which would move it."""
    start, seen = start_of(3), []
    for name, value in by_hand(start, 1, 6, 0.1, optimizer)[0].items():
        start[name][1] = value  # on its way already
    alone = [by_hand(start, number, 40, 0.1, optimizer, 0.1) for number in range(3)]
    first = bowls(start, torch.arange(3))
    limit = first[1].item() + 1e-3  # request 1 is below it before its first step
    assert (first > limit).sum() == 2

    def losses(values, active):
        seen.append(active.tolist())
        return bowls(values, active)

    found = optimise(start, losses, 40, 0.1, optimizer, weight_decay=0.1, stop_below=limit)
    assert all(torch.equal(found[name][1], start[name][1]) for name in SHAPES)
    ends = {}
    for number in (0, 2):
        expected, ends[number] = by_hand(start, number, 40, 0.1, optimizer, 0.1, limit)
        assert_same(found, expected, number)
        assert bowl(expected, number) < limit
        assert not torch.allclose(expected["matrix"], alone[number][0]["matrix"], atol=1e-3)  # it went no further
    assert ends[0] != ends[2]
    assert ends[0] > 1
    assert ends[2] > 1
    # A loss is asked for once more than a request takes steps; nobody is asked for a request that is done.
    assert [sum(number in active for active in seen) for number in range(3)] == [ends[0] + 1, 1, ends[2] + 1]
    assert seen[0] == [0, 1, 2]


def test_a_loss_at_the_limit_is_not_below_it():
    start = {"x": torch.tensor([2.0, 1.9999, 2.0001])}
    found = optimise(start, lambda values, active: values["x"], 9, 0.5, stop_below=2.0)
    torch.testing.assert_close(found["x"], torch.tensor([1.5, 1.9999, 1.5001]))  # Adam's first step is its rate


def test_each_request_is_put_back_where_it_may_be():
    start, called, taken = start_of(3), [], {}
    limits = [0.05, 0.3, 10.0]

    def into(values, limit):
        for value in values.values():
            value.clamp_(-limit, limit)

    def project(values, number):
        called.append(number)
        assert {name: tuple(value.shape) for name, value in values.items()} == SHAPES
        into(values, limits[number])

    found = optimise(start, bowls, 8, 0.2, stop_below=4.0, project=project)
    for number, limit in enumerate(limits):
        expected, taken[number] = by_hand(
            start, number, 8, 0.2, "adam", stop=4.0, project=lambda values, limit=limit: into(values, limit)
        )
        assert_same(found, expected, number)
        if taken[number]:
            assert all(value[number].abs().max() <= limit + 1e-7 for value in found.values())
    assert [called.count(number) for number in range(3)] == list(taken.values())
    assert found["matrix"][0].abs().max() > 0.049  # the bound is what holds it
    assert taken[0] == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_told_with_its_request(bad):
    def losses(values, active):
        wrong = torch.tensor([bad if number == 2 else 0.0 for number in active.tolist()])
        good = torch.tensor([number in (0, 1) for number in active.tolist()])
        return torch.where(good, 0.0, values["x"].square() + 1) + (0 if len(active) == 4 else wrong)

    with pytest.raises(UserError, match=r"request 2: the loss is -?(nan|inf).*smaller lr"):
        optimise({"x": torch.ones(4)}, losses, 3, 0.1, stop_below=0.5)  # 0 and 1 are out when it happens


def test_an_unknown_optimizer_is_told_before_anything_is_asked():
    with pytest.raises(UserError, match="unknown optimizer 'sgd'; there are: adam, adafactor"):
        optimise({"x": torch.ones(2)}, lambda values, active: 1 / 0, 3, 0.1, "sgd")
    assert set(OPTIMIZERS) == {"adam", "adafactor"}


def test_a_negative_rate_is_refused():
    with pytest.raises(UserError, match=r"lr must be at least 0, got -0\.1"):
        optimise({"x": torch.ones(2)}, lambda values, active: values["x"].square(), 3, -0.1)
