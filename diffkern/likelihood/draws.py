"""Random numbers of a sample and the unit of the results, for both methods."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..process import checked_int

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


def dequantized(x: Tensor, seeds: Tensor, levels: int | None) -> Tensor:
    """x [B, ...], uniform within its level, in [-1, 1] as a whole: float64. x itself where ``levels`` is None."""
    x = x.double()
    if levels is None:
        return x
    level = ((x + 1) * ((levels - 1) / 2)).round()
    return (level + uniform(seeds, x.shape[1:], DEQUANTIZE)) * (2 / levels) - 1


def check_levels(x: Tensor, levels: int | None) -> None:
    """Raise TypeError or ValueError unless there are samples x [N, ...], whose values are among so many levels."""
    if levels is not None and checked_int("levels", levels, "an int >= 2 or None") < 2:
        raise ValueError(f"levels: expected an int >= 2 or None, got {levels}")
    if not len(x):
        raise ValueError("x: expected at least one sample, got none")
    if levels is not None and not (x.abs() <= 1).all():
        got = f"{x.min().item():.3g} to {x.max().item():.3g}"
        raise ValueError(f"x: expected values in [-1, 1], or levels=None for continuous ones, got {got}")


def offset(levels: int | None) -> float:
    """The bits a dimension that tell a level rather than a density: for the width 2 / levels."""
    return 0.0 if levels is None else math.log2(levels / 2)


def bits(nats: Tensor) -> Tensor:
    """The mean over a sample's dimensions of nats [B, ...], in bits: [B]."""
    return nats.flatten(1).mean(1) / math.log(2)
