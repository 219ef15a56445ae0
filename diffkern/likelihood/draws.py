"""What both ways share: the random numbers of a sample, and the unit of their results."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops

LIKELIHOOD_STREAM = 8
"""The stream of the random numbers here, beside the forward noise of stream 2. Step i has the signs of probe i."""
DEQUANTIZE, STRATA = 1 << 31, 1 << 30
"""Steps of that stream: the place of a value within its level; the t of part j, at STRATA + j."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""The network with a batch's conditions: (x_t [B, ...], t [B]) -> out."""

Terms = tuple[Tensor, Tensor, Tensor, int]
"""prior [B], t [B, any], data [B], whose sum is a sample's bits a dimension; and the calls of the network."""


def uniform(seeds: Tensor, shape: tuple[int, ...], step: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [B, *shape]: Phi of the addressed normals."""
    return torch.special.ndtr(ops.noise(seeds, shape, step=step, stream=LIKELIHOOD_STREAM).double())


def signs(seeds: Tensor, shape: tuple[int, ...], step: int) -> Tensor:
    """-1 or 1 with equal probability, float32 [B, *shape]."""
    z = ops.noise(seeds, shape, step=step, stream=LIKELIHOOD_STREAM)
    return torch.ones_like(z).copysign(z)


def bits(nats: Tensor) -> Tensor:
    """The mean over a sample's dimensions of nats [B, ...], in bits: [B]."""
    return nats.flatten(1).mean(1) / math.log(2)
