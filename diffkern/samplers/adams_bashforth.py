"""Adams-Bashforth on eps: dy/drho = eps in y = x / alpha, by a polynomial through the last predictions of eps."""

from typing import Any

import numpy as np

from ..process import Grid, Point, Process
from .options import one_of
from .registry import sampler

NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)  # of the integrals, on [-1, 1]


def _adams_bashforth(m: Any, grid: Grid, order: int, clock: str) -> Any:
    one_of("order", order, (1, 2, 3, 4))
    x, past = m.start(), []
    for s, t in m.steps():
        past = [(m.keep(m.eps(x, s)), s), *past][:order]
        y = x / s.alpha
        for (e, _), weight in zip(past, _integrals(grid.process, s, t, [at for _, at in past], clock), strict=True):
            y = y + e * weight
        x = y * t.alpha
    return m.program(x)


def _integrals(process: Process, s: Point, t: Point, points: list[Point], clock: str) -> list[float]:
    """The integrals over rho from s to t of the Lagrange polynomials in the clock through the points."""
    if len(points) == 1 or t.sigma == 0 and clock != "rho":
        return [t.rho - s.rho, *(0.0 for _ in points[1:])]
    low, high = (getattr(point, clock) for point in (s, t))
    u, weights = (high - low) / 2 * NODES + (high + low) / 2, (high - low) / 2 * WEIGHTS
    if clock == "lam":
        weights = weights * -np.exp(-u)
    elif clock == "time":
        alpha, sigma = process.alpha(u), process.sigma(u)
        rate = [(d_sigma, d_alpha) for d_alpha, d_sigma in (process.derivatives(float(value)) for value in u)]
        d_sigma, d_alpha = np.array(rate).T
        weights = weights * (d_sigma * alpha - sigma * d_alpha) / alpha**2
    nodes = [getattr(point, clock) for point in points]
    basis = [np.prod([(u - b) / (a - b) for b in nodes if b != a], axis=0) for a in nodes]
    return [float(np.sum(weights * values)) for values in basis]


@sampler()
def lms(m: Any, grid: Grid, order: int = 4) -> Any:
    """Linear multistep: the polynomial in rho. order: 1 to 4, lower in the first steps."""
    return _adams_bashforth(m, grid, order, "rho")


@sampler()
def deis(m: Any, grid: Grid, order: int = 3, clock: str = "lam") -> Any:
    """DEIS (Zhang & Chen 2023): the polynomial in "lam" (lambda), or in "time", as the paper's tAB. order: 1 to 4."""
    return _adams_bashforth(m, grid, order, one_of("clock", clock, ("lam", "time")))


@sampler()
def ipndm(m: Any, grid: Grid, order: int = 4) -> Any:
    """Improved PNDM (Zhang & Chen 2023; Liu et al. 2022): the weights of equal steps, on whatever steps there are."""
    one_of("order", order, (1, 2, 3, 4))
    fixed = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    x, past = m.start(), []
    for s, t in m.steps():
        past = [m.keep(m.eps(x, s)), *past][:order]
        y = x / s.alpha
        for e, weight in zip(past, fixed[len(past) - 1], strict=True):
            y = y + e * (weight * (t.rho - s.rho))
        x = y * t.alpha
    return m.program(x)
