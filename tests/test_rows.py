"""Gradients are the same in every run, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from instructedit.editors.gated import gated
from instructedit.editors.mend import ResidualLayers
from instructedit.edits import Factors, LowRankEdit
from instructedit.rows import take_rows

ROWS = 6000  # threads share out an addition from some 30,000 numbers on


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def index(size: int, seed: int = 1) -> Tensor:
    return torch.randint(0, size, (ROWS,), generator=torch.Generator().manual_seed(seed))


def gradients(make: Callable[[], Tensor], of: list[Tensor]) -> list[Tensor]:
    """Of the sum of what is made, weighted, to some leaves."""
    made = make()
    return list(torch.autograd.grad((made * random(*made.shape, seed=2)).sum(), of))


def repeated(make: Callable[[], Tensor], of: list[Tensor]) -> None:
    first = gradients(make, of)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(make, of), strict=True))


def test_rows_are_those_of_the_index_and_so_is_their_gradient() -> None:
    tensor, which = random(40, 3, 8).requires_grad_(), index(40)
    assert torch.equal(take_rows(tensor, which), tensor[which])
    (own,) = gradients(lambda: take_rows(tensor, which), [tensor])
    (exact,) = gradients(lambda: tensor.double()[which], [tensor])
    torch.testing.assert_close(own, exact.float(), rtol=1e-4, atol=1e-3)


def test_a_hypernetworks_gradient_is_the_same_each_time() -> None:
    layers = ResidualLayers(96, 8, 3, 2)
    for parameter in layers.parameters():
        parameter.data = random(*parameter.shape)
    tokens, film = random(ROWS, 96), random(3, 2, 4, 96).requires_grad_()
    repeated(lambda: layers.layers(tokens, index(8), film, index(4)), [*layers.parameters(), film])


def test_the_gradient_of_edits_that_rows_share_is_the_same_each_time() -> None:
    a, b = random(4, 2, 16).requires_grad_(), random(4, 2, 16).requires_grad_()
    edit = LowRankEdit({"site": Factors(a, b)})
    inputs, outputs = random(ROWS, 1, 16), random(ROWS, 1, 16)
    repeated(lambda: edit.change("site", inputs, outputs, index(4)), [a, b])


@pytest.mark.parametrize("ascending", [True, False])
def test_a_gate_is_its_formula_and_so_are_its_gradients(ascending: bool) -> None:
    which = index(5).sort().values if ascending else index(5)
    which = which + (which > 2)  # one scale has no row
    given = [random(ROWS, 24, seed=3), random(ROWS, 24, seed=4), random(6, 24, seed=5), random(6, 24, seed=6)]
    given[1][:9] = given[3][which[:9]] = 0  # at zero, where hypernetworks start, the relu has slope 1

    def formula(z: Tensor, mapped: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        before = mapped * scale[which] + shift[which]
        return z + before * (before >= 0)

    own = [tensor.clone().requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in given]
    torch.testing.assert_close(gated(*own, which), formula(*exact).float(), rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(lambda: gated(*own, which), own), gradients(lambda: formula(*exact), exact), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-3)


def test_a_gates_gradient_is_the_same_each_time() -> None:
    own = [random(rows, 96, seed=rows + i).requires_grad_() for rows in (ROWS, 8) for i in range(2)]
    which = index(8).sort().values
    repeated(lambda: gated(*own, which), own)
