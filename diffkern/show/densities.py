"""Densities in two dimensions whose entropy is known: eight Gaussians, two moons, a checkerboard."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussians import Gaussians

FLOAT = dict(dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Density:
    """A distribution of points of the plane.

    draw      (n, seed) -> points, float32 [n, 2]
    log_prob  points [N, 2] -> ln of the density, float64 [N]
    entropy   in nats
    limit     of the square from -limit to limit, beyond which there is next to nothing
    """

    draw: Callable[[int, int], Tensor]
    log_prob: Callable[[Tensor], Tensor]
    entropy: float
    limit: float

    def grid(self, side: int) -> Tensor:
        """The points of ``side`` rows of as many: [side * side, 2], row by row, the lowest first."""
        ticks = torch.linspace(-self.limit, self.limit, side, **FLOAT)
        return torch.cartesian_prod(ticks, ticks).flip(1)


def eight_gaussians(std: float = 0.2) -> Density:
    """Eight Gaussians on a circle of radius 2: far from one another, so that the entropy is near ln 8 + that of one."""
    angle = torch.arange(8, **FLOAT) * (math.pi / 4)
    return _mixture(2 * torch.stack((angle.cos(), angle.sin()), 1), std, limit=3.0)


def moons(std: float = 0.1) -> Density:
    """Two half circles that reach into one another, with Gaussian noise: a mixture of 60 Gaussians along each."""
    angle = (torch.arange(60, **FLOAT) + 0.5) * (math.pi / 60)
    one = torch.stack((angle.cos() - 0.5, angle.sin() - 0.25), 1)
    return _mixture(1.5 * torch.cat((one, -one)), 1.5 * std, limit=3.0)


def checkerboard() -> Density:
    """Uniform on the eight black squares of a board of four by four, each of side 1."""

    def draw(n: int, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        square = torch.randint(8, (n,), dtype=torch.int64, device="cpu", generator=generator)
        row = square // 2
        corner = torch.stack((2 * (square % 2) + row % 2, row), 1) - 2
        return corner + torch.rand(n, 2, dtype=torch.float32, device="cpu", generator=generator)

    def log_prob(x: Tensor) -> Tensor:
        column, row = x.double().floor().unbind(1)
        black = (x.abs() < 2).all(1) & ((column + row) % 2 == 0)
        return torch.where(black, -math.log(8), -math.inf)

    return Density(draw, log_prob, math.log(8), limit=2.5)


DENSITIES = {"eight Gaussians": eight_gaussians, "moons": moons, "checkerboard": checkerboard}


def _mixture(means: Tensor, std: float, limit: float) -> Density:
    """Equal Gaussians, with the entropy by the trapezoidal rule: exact to rounding where the grid is finer than std."""
    data = Gaussians(means.tolist(), [std] * len(means))
    density = Density(lambda n, seed: data.draw(n, seed)[0], data.log_prob, math.nan, limit)
    log_p, cell = torch.cat([data.log_prob(x) for x in density.grid(150).split(2000)]), (2 * limit / 149) ** 2
    return Density(density.draw, density.log_prob, -(log_p.exp() * log_p).sum().item() * cell, limit)
