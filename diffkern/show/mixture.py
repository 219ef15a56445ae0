"""Samplers in few steps on a mixture of Gaussians whose exact network is known.

    distance = 2 E|X - Y| - E|X - X'| - E|Y - Y'|                        the energy distance (Szekely & Rizzo 2013)

X are samples, Y points of the mixture. The table has the distance and how far the share of a mode is from its weight
at most; the last row is for other points of the mixture in place of samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sampling import sample
from ..schedule import Schedule
from . import Figure, sampler_of
from .gaussians import Gaussians, plane

DATA = Gaussians([[-1.2, -0.8], [1.2, -0.5], [0.0, 1.2]], [0.2, 0.35, 0.15], [0.3, 0.5, 0.2])
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m", "unipc")
STEPS = (5, 10, 20, 50)
LIMIT = 2.5


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Between the distributions of two sets of points [N, D] and [M, D], without bias: near 0 it may be below 0."""
    x, y = x.double(), y.double()
    within = (torch.cdist(points, points).sum() / (len(points) * (len(points) - 1)) for points in (x, y))
    return (2 * torch.cdist(x, y).mean() - sum(within)).item()


def share_error(x: Tensor) -> float:
    """The largest difference between the share of points that a mode has and its weight."""
    shares = DATA.log_parts(x).argmax(1).bincount(minlength=len(DATA.weights)).double() / len(x)
    return (shares - DATA.weights).abs().max().item()


def figure(n: int = 2000, samplers: Sequence[str] = SAMPLERS) -> Figure:
    """n samples of each sampler, as ddim or ddim,eta=1, and number of steps."""
    model, (truth, _), (others, _) = DATA.model(Schedule.linear()), DATA.draw(n, seed=1), DATA.draw(n, seed=2)
    rows, panels = [], []
    for text in samplers:
        name, options = sampler_of(text)
        for steps in STEPS:
            x = sample(model, n, sampler=name, steps=steps, batch_size=n, progress=False, **options)
            rows.append((text, steps, energy_distance(x, truth), share_error(x)))
            panels.append(plane(f"{text}, {steps} steps", DATA, {"": x}, LIMIT))
    rows.append(("the mixture", 0, energy_distance(others, truth), share_error(others)))
    return Figure(("sampler", "steps", "energy distance", "share of a mode"), rows, panels, across=len(STEPS))
