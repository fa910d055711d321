"""The sizes of layers' inputs, outputs and weights, from which learning rates and radii are derived.

Layers' outputs differ by factors of a hundred between models, so that no fixed learning rate or radius suits them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from instructedit.lm import FrozenLM, Site
from instructedit.lm.sharding import gathered

#: Beginnings of sentences that have nothing to do with one another.
NEUTRAL_PROMPTS = (
    "The capital of Norway is", "My grandmother always used to say that", "Water begins to boil when",
    "The committee will publish its report", "In the second half of the match", "She closed the door and",
    "Plants turn sunlight into", "The price of wheat has", "He was born in the city of", "To install the program,",
    "The oldest bridge across the river", "I have never tasted", "The court decided that", "A triangle has three",
    "Shortly before midnight the train", "The novel was written by", "Most birds in this region", "Please send the",
    "During the long winter of that year", "The instrument that she plays is",
)  # fmt: skip

#: Number of noise vectors by which the size of weights is measured.
_DRAWS = 256


class LayerScale(NamedTuple):
    """Typical sizes of a layer's inputs and outputs, over the last tokens of unrelated prompts.

    Attributes:
        inputs: Typical size of an input coordinate: root mean square within a vector, median over vectors.
        outputs: Typical size of an output coordinate, measured likewise.
        distance: Median Euclidean distance between the layer's inputs at two of the prompts.
    """

    inputs: float
    outputs: float
    distance: float


def layer_scale(lm: FrozenLM, layer: str) -> LayerScale:
    """Measures a layer's scale on some neutral prompts, independently of what is edited.

    Args:
        lm: The model; edits that are applied to it do not count.
        layer: Name of a site or feed-forward module.
    """
    batch = lm.encode([(prompt, "it") for prompt in NEUTRAL_PROMPTS]).prompts()
    with lm.applied.suspended():
        layer_io = lm.record_activations(batch, [layer])[layer]
    last = (torch.arange(len(batch)), torch.tensor(batch.lengths) - 1)
    inputs, outputs = layer_io.inputs[last].float(), layer_io.outputs[last].float()
    return LayerScale(_size(inputs), _size(outputs), torch.pdist(inputs).median().item())


@torch.no_grad()
def weight_size(lm: FrozenLM, site: Site) -> float:
    """Estimates the root mean square of a site's weights, in any storage format, from noise, to a few per cent.

    Edits that are applied to the model do not count.
    """
    layer = lm.model.get_submodule(site.name)
    noise = torch.randn(_DRAWS, site.in_features, generator=torch.Generator().manual_seed(0))
    noise = noise.to(lm.device, lm.model.dtype)
    with lm.applied.suspended(), gathered(lm.forward.blocks[site.block]):
        without_bias = layer(noise) - layer(torch.zeros_like(noise[:1]))
    return (without_bias.float().square().mean() / site.in_features).sqrt().item()


def _size(vectors: Tensor) -> float:
    return vectors.square().mean(-1).sqrt().median().item()
