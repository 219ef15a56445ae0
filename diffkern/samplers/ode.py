"""Runge-Kutta on the probability-flow ODE: euler, heun and higher in y = x / alpha over rho = sigma / alpha, where
dy/drho = eps (Karras et al. 2022; Song et al. 2021a, eq. 14); velocity in x over t."""

import math
from typing import Any

from ..process import Grid
from .options import number, one_of
from .registry import sampler


@sampler()
def euler(m: Any, grid: Grid) -> Any:
    """dy/drho = eps by Euler's steps: ``ddim`` in other words."""
    x = m.start()
    for s, t in m.steps():
        d = m.eps(x, s)
        x = (x / s.alpha + d * (t.rho - s.rho)) * t.alpha
    return m.program(x)


@sampler(calls=2)
def heun(
    m: Any, grid: Grid, churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
) -> Any:
    """Karras et al. 2022, algorithms 1 and 2. The last step, to sigma = 0, is Euler's.

    churn         S_churn: 0 is deterministic; more adds noise before each step with rho in [s_min, s_max]
    s_noise       the standard deviation of that noise
    """
    churn, s_noise, s_min = number("churn", churn, 0), number("s_noise", s_noise, 0), number("s_min", s_min, 0)
    s_max = s_max if s_max == math.inf else number("s_max", s_max, 0)
    x = m.start()
    for s, t in m.steps():
        gamma = min(churn / len(grid), math.sqrt(2) - 1) if s_min <= s.rho <= s_max else 0.0
        if gamma > 0:
            up = grid.process.at_rho(s.rho * (1 + gamma), s.address)
            x = (x / s.alpha + m.z(s) * (s_noise * math.sqrt(up.rho**2 - s.rho**2))) * up.alpha
            s = up
        d = m.eps(x, s)
        y = x / s.alpha
        x = (y + d * (t.rho - s.rho)) * t.alpha
        if t.sigma > 0:
            d = (d + m.eps(x, t)) / 2
            x = (y + d * (t.rho - s.rho)) * t.alpha
    return m.program(x)


def _runge_kutta(m: Any, grid: Grid, nodes: list[float], stages: list[list[float]], weights: list[float]) -> Any:
    """An explicit Runge-Kutta method by its tableau. A stage at sigma = 0 has no eps: the last step is Euler's."""
    x = m.start()
    for s, t in m.steps():
        h, y, slopes = t.rho - s.rho, None, []
        last = t.sigma == 0
        for c, row in zip(nodes[:1] if last else nodes, stages, strict=False):
            at = s if c == 0 else t if c == 1 else grid.process.at_rho(s.rho + c * h, s.address)
            if slopes:
                x = y
                for a, slope in zip(row, slopes, strict=True):
                    x = x + slope * (a * h) if a else x
                x = x * at.alpha
            slopes.append(m.eps(x, at))
            y = x / s.alpha if y is None else y
        for b, slope in zip([1.0] if last else weights, slopes, strict=True):
            y = y + slope * (b * h) if b else y
        x = y * t.alpha
    return m.program(x)


@sampler(calls=2)
def midpoint(m: Any, grid: Grid) -> Any:
    """The midpoint rule, of order 2."""
    return _runge_kutta(m, grid, [0, 1 / 2], [[], [1 / 2]], [0, 1])


@sampler(calls=3)
def kutta3(m: Any, grid: Grid) -> Any:
    """Kutta's method of order 3."""
    return _runge_kutta(m, grid, [0, 1 / 2, 1], [[], [1 / 2], [-1, 2]], [1 / 6, 2 / 3, 1 / 6])


@sampler(calls=4)
def rk4(m: Any, grid: Grid) -> Any:
    """The classical method of order 4."""
    stages = [[], [1 / 2], [0, 1 / 2], [0, 0, 1]]
    return _runge_kutta(m, grid, [0, 1 / 2, 1 / 2, 1], stages, [1 / 6, 1 / 3, 1 / 3, 1 / 6])


@sampler(calls=6)
def dopri5(m: Any, grid: Grid) -> Any:
    """Dormand & Prince's method of order 5, in fixed steps."""
    stages = [
        [],
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    ]
    weights = [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]
    return _runge_kutta(m, grid, [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1], stages, weights)


@sampler()
def velocity(m: Any, grid: Grid, order: int = 2) -> Any:
    """dx/dt = alpha' x_0 + sigma' eps by Euler's (order 1) or Heun's (2) steps in t: the sampler of flows.

    Nothing is divided by alpha, so that a run may start at alpha = 0 (Lipman et al. 2023).
    """
    one_of("order", order, (1, 2))

    def slope(x, s):
        d_alpha, d_sigma = grid.process.derivatives(s.time)
        x0, e = m.predict(x, s)
        return x0 * d_alpha + e * d_sigma

    x = m.start()
    for s, t in m.steps():
        if math.isnan(t.time):  # the end of a process whose own time stops before
            x = m(x, s) * t.alpha
            continue
        h, d, start = t.time - s.time, slope(x, s), x
        x = start + d * h
        if order == 2 and t.sigma > 0:
            x = start + (d + slope(x, t)) * (h / 2)
    return m.program(x)
