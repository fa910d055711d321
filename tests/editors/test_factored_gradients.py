"""Gradients held as products: the sums that autograd makes, their norm, and the very steps of AdamW."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from instructedit.editors.factored_gradients import FactoredGradient, factor_gradients, factored_matrices, linear
from instructedit.training.optimizer import ProductAdamW


@given(rows=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_a_product_is_the_sum_and_knows_its_norm(rows, seed):
    torch.manual_seed(seed)
    factored, expected = FactoredGradient(), torch.zeros(5, 7)
    for count in rows:
        x, g = torch.randn(count, 5), torch.randn(count, 7)
        factored.add(x, g)
        expected += x.T @ g
    assert len(factored) == sum(rows)
    torch.testing.assert_close(factored.dense(), expected)
    torch.testing.assert_close(factored.squared_norm(), expected.square().sum(), rtol=1e-4, atol=1e-4)
    factored.scale(torch.tensor(0.5))
    torch.testing.assert_close(factored.dense(), expected / 2)
    factored.clear()
    assert not len(factored)


class Network(nn.Module):
    """Two matrices that hold products, one that is used otherwise, and a vector."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(16, 24))
        self.bias, self.other = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24, 3))

    def forward(self, x):
        return (linear(linear(x, self.down), self.up, self.bias) + x) @ self.other


@pytest.mark.parametrize("rows", [1, 4, 50])  # 50: more than the matrices have
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_a_training_step_is_adamws(rows, max_norm):
    torch.manual_seed(0)
    networks = [Network(), Network()]
    networks[1].load_state_dict(networks[0].state_dict())
    factor_gradients(networks[1].parameters())
    plain = torch.optim.AdamW(networks[0].parameters(), lr=0.01, weight_decay=0.1)
    own = ProductAdamW(networks[1].parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for _ in range(2):  # two batches a step
            x = torch.randn(rows, 24)
            inputs = [x.clone().requires_grad_() for _ in networks]
            for network, own_x in zip(networks, inputs, strict=True):
                network(own_x).tanh().sum().backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        factored = {id(parameter) for parameter, _ in factored_matrices(networks[1].parameters())}
        assert factored == ({id(networks[1].down), id(networks[1].up)} if rows < 50 else set())
        assert all((p.grad is None) == (id(p) in factored) for p in networks[1].parameters())
        norm = torch.nn.utils.clip_grad_norm_(networks[0].parameters(), max_norm)
        torch.testing.assert_close(own.clip(max_norm), norm, rtol=1e-4, atol=0)
        for optimizer in (plain, own):
            optimizer.step()
            optimizer.zero_grad()
        assert not list(factored_matrices(networks[1].parameters()))
        for found, expected in zip(networks[1].parameters(), networks[0].parameters(), strict=True):
            assert found.grad is None
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_step_runs_its_closure_first_and_gives_its_loss():
    network = Network()
    factor_gradients(network.parameters())
    optimizer = ProductAdamW(network.parameters(), lr=0.01)
    before = network.down.detach().clone()

    def closure():
        loss = network(torch.ones(1, 24)).sum()
        loss.backward()
        return loss

    expected = network(torch.ones(1, 24)).sum()
    torch.testing.assert_close(optimizer.step(closure), expected)
    assert (network.down != before).any()


def test_dense_gradients_are_there_after_a_step_as_before():
    network = Network()
    factor_gradients(network.parameters())
    optimizer = ProductAdamW(network.parameters(), lr=0.01)
    network(torch.ones(1, 24)).sum().backward()
    kept, once = network.other.grad.clone(), network.other.detach().clone()
    optimizer.step()
    assert torch.equal(network.other.grad, kept)
    # One step moves each weight by the learning rate, not by one for each matrix.
    torch.testing.assert_close((network.other - once).abs().max(), torch.tensor(0.01), rtol=0.2, atol=0)


def test_one_matrix_at_a_time_is_dense(monkeypatch):
    network, alive = Network(), []
    factor_gradients(network.parameters())
    optimizer = ProductAdamW(network.parameters(), lr=0.01)
    step = torch.optim.AdamW.step

    def watched(self, closure=None):
        alive.append([name for name, p in network.named_parameters() if p.grad is not None])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    network(torch.ones(1, 24)).sum().backward()
    optimizer.step()
    assert alive == [["bias", "other"], ["down"], ["up"]]


def test_under_autocast_the_gradients_are_those_of_float32_up_to_rounding():
    torch.manual_seed(0)
    network, x = Network(), torch.randn(3, 24)
    found = []
    for on in (False, True):
        factor_gradients(network.parameters(), on)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            network(x).sum().backward()
        found.append([p.grad if p.grad is not None else p.factored_grad.dense() for p in network.parameters()])
    for plain, own in zip(*found, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, plain, rtol=0.05, atol=0.3)


def test_off_again_gradients_are_dense():
    network = Network()
    factor_gradients(network.parameters())
    factor_gradients(network.parameters(), False)
    network(torch.ones(1, 24)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
