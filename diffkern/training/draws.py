"""Random choices of training: each a function of an example's number and the run's seed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import EXAMPLE_STREAM, words
from ..process import Process
from .times import Importance, Times, Uniform, at, steps

UNIFORM = Uniform()


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of what torch draws in a step of a run, such as dropout, in one of its processes."""
    low, high, *_ = words(np.array([step]), 2 + rank, EXAMPLE_STREAM, seed)[0].tolist()
    return low | (high & 0x7FFFFFFF) << 32


@dataclass(frozen=True)
class Draws:
    """The random draws of N examples, each a function of the example's number and the run's seed."""

    seeds: Tensor  # [N] int64: of the forward noise (stream 2)
    t: Tensor  # [N]: int64, in 0..T-1, of a schedule; float64 of another process
    null: Tensor  # [N] bool: the label is dropped
    flip: Tensor  # [N] bool: the image may be mirrored
    weights: Tensor | None = None  # [N] float32, of the losses: where t is drawn by importance


def draw(examples: np.ndarray, seed: int, T: int | Process, label_dropout: float, times: Times = UNIFORM) -> Draws:
    """For each example number k: Philox words of (k, stream 3) are seed (two of them), t, and label dropout.

    T      how many time steps a schedule has, or a process of real times
    times  how t is drawn from its word
    """
    w = words(examples, 0, EXAMPLE_STREAM, seed)
    weights = None
    if isinstance(times, Importance):
        t, weights = times(w[:, 2])
    elif isinstance(T, Process):
        t = torch.from_numpy(at(times, w[:, 2], T))
    else:
        t = steps(times, w[:, 2], T)
    return Draws(
        seeds=torch.from_numpy((w[:, 0] | w[:, 1] << np.uint64(32)).view(np.int64)),
        t=t,
        null=torch.from_numpy(w[:, 3] * 2.0**-32 < label_dropout),
        flip=torch.from_numpy(words(examples, 1, EXAMPLE_STREAM, seed)[:, 0] >> np.uint64(31) == 1),
        weights=weights,
    )
