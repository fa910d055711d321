"""Products of a few rows against double precision, and the layers and models that run them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import ARCHITECTURES, random_lm
from tests.reference import relative
from torch import nn
from transformers.pytorch_utils import Conv1D

from instructedit.lm.small_batch import FEW, _conv1d, _linear, small_batch_matmul


def exact(layer, inputs):
    weight = layer.weight.T if isinstance(layer, nn.Linear) else layer.weight
    out = inputs.double() @ weight.double()
    return out if layer.bias is None else out + layer.bias.double()


@given(
    size=st.integers(1, 24), features=st.integers(1, 24), rows=st.integers(1, 9), threads=st.integers(1, 6),
    bias=st.booleans(), strided=st.booleans(),
)  # fmt: skip
def test_the_threads_parts_make_the_whole(size, features, rows, threads, bias, strided):
    inputs = torch.randn(rows, 2 * size)[:, ::2] if strided else torch.randn(size, rows).T
    for layer, product in ((nn.Linear(size, features, bias), _linear), (Conv1D(features, size), _conv1d)):
        if layer.bias is not None:
            nn.init.normal_(layer.bias)  # a Conv1D's is zero
        found = product(layer.weight.detach(), layer.bias, threads)(inputs)
        torch.testing.assert_close(found, exact(layer, inputs).float(), atol=1e-5, rtol=1e-4)


def refusing(layer):
    """The layer, whose own product fails."""

    def fail(_):
        raise AssertionError("its own product")

    layer.forward = fail
    return layer


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Linear(8, 7, bias=False), Conv1D(6, 8)])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (FEW, 8)])
def test_few_rows_take_the_other_product(layer, shape):
    inputs, expected = torch.randn(*shape), layer(torch.zeros(shape)).shape
    with small_batch_matmul([refusing(layer)]):
        found = layer(inputs)
    assert found.shape == expected
    torch.testing.assert_close(found, exact(layer, inputs).float(), atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError, match="its own product"):  # what the layer had is put back
        layer(inputs)
    del layer.forward


class Odd(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) + 1


def strided():
    layer = nn.Linear(8, 8)
    layer.weight.data = layer.weight.data.T
    return layer


@pytest.mark.parametrize(
    ("layer", "rows"),
    [(nn.Linear(8, 6), FEW + 1), (nn.Linear(8, 6), 0), (Odd(8, 6), 2), (nn.Linear(8, 6).bfloat16(), 2), (strided(), 2)],
)
@torch.no_grad()
def test_the_others_take_their_own(layer, rows):
    inputs = torch.randn(rows, 8, dtype=layer.weight.dtype)
    expected = layer(inputs)
    with small_batch_matmul([layer]):
        assert torch.equal(layer(inputs), expected)
        if rows == 2:
            assert "forward" not in vars(layer)
    assert "forward" not in vars(layer)


def test_gradients_take_the_own_product():
    layer, inputs = refusing(nn.Linear(8, 6)), torch.randn(2, 8, requires_grad=True)
    with small_batch_matmul([layer]), pytest.raises(AssertionError, match="its own product"):
        layer(inputs)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_words_and_scores_are_made_of_them(tokenizer, architecture):
    lm = random_lm(architecture, tokenizer)
    batch = lm.encode([("The capital of France is", "Lyon")])
    states, words = lm.scores.unedited_states(batch), lm.generate("The capital of", max_new_tokens=4)
    expected = lm.model(**batch.inputs).logits[batch.answer_at]
    refusing(lm.model.get_output_embeddings())
    assert relative(lm.forward.head(states), expected) < 1e-5
    for layer in lm.model.modules():
        if type(layer) in (nn.Linear, Conv1D):
            refusing(layer)
    assert lm.generate("The capital of", max_new_tokens=4) == words


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), Conv1D(8, 6)])
def test_outputs_can_be_seen_as_any_shape(layer):
    """DeepSeek-V2 views pairs of numbers as complex ones, which asks for a last stride of 1."""
    with small_batch_matmul([layer]), torch.no_grad():
        found = layer(torch.randn(2, 3, 6))
    assert found.is_contiguous()
    assert torch.view_as_complex(found.view(2, 3, 4, 2)).shape == (2, 3, 4)
