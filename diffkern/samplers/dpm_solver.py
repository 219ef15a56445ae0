"""DPM-Solver++ (Lu et al. 2022b): multistep, singlestep and SDE solvers in lambda = ln(alpha / sigma), on x0_hat.

    x_t = sigma_t / sigma_s x_s + alpha_t int e^(lambda - lambda_t) x0_hat(lambda) dlambda

A step to sigma = 0, or from alpha = 0, is infinitely long and has order 1.
"""

import math
from typing import Any

from ..process import Grid
from .options import number, one_of
from .registry import sampler


def _multistep(m: Any, grid: Grid, order: int, lower_final: bool, published: bool = False) -> Any:
    x, past = m.start(), []
    for i, (s, t) in enumerate(m.steps()):
        x0, h = m(x, s), s.to(t)
        past = [(x0, s.lam), *past][:order]
        p = min(order, i + 1, len(grid) - i if lower_final else order) if math.isfinite(h) else 1
        integral = -math.expm1(-h)  # of 1
        x = x * (t.sigma / s.sigma) + x0 * (t.alpha * integral)
        if p >= 2:
            before, u_1 = past[1][0], (past[1][1] - s.lam) / h
            slope = (before - x0) / u_1
            if p == 3:
                u_2 = (past[2][1] - s.lam) / h
                bend = (
                    (past[2][0] - before) / (u_2 - u_1) - slope
                ) / u_2  # Newton's f[0, 1, 2]: half the 2nd derivative
                of_u = 1 - integral / h
                of_u2 = 1 - 2 * of_u / h
                x = x + (slope - bend * u_1) * (t.alpha * of_u) + bend * (t.alpha * of_u2 / (2 if published else 1))
            else:
                x = x + slope * (t.alpha * integral / 2)
    return m.program(x)


@sampler()
def dpmpp_1m(m: Any, grid: Grid) -> Any:
    """DPM-Solver++ of order 1: ``ddim`` in other words."""
    return _multistep(m, grid, 1, True)


@sampler(slots=1)
def dpmpp_2m(m: Any, grid: Grid, lower_final: bool = True) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). lower_final: order 1 in the last step."""
    return _multistep(m, grid, 2, lower_final)


@sampler()
def dpmpp_3m(m: Any, grid: Grid, lower_final: bool = True, published: bool = False) -> Any:
    """The same to order 3. published: with half of the second derivative, as its authors' code has it, to order 2."""
    return _multistep(m, grid, 3, lower_final, published)


@sampler(steps=10, calls=2)
def dpmpp_2s(m: Any, grid: Grid, r: float = 0.5) -> Any:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1), with its second call at r of the way in lambda."""
    r = number("r", r, 0.01, 0.99)
    x = m.start()
    for s, t in m.steps():
        x0, h = m(x, s), s.to(t)
        u = grid.process.between(s, t, r)
        if u is None:
            x = x * (t.sigma / s.sigma) - x0 * (t.alpha * math.expm1(-h))
            continue
        start, at = x, s.to(u)
        x = start * (u.sigma / s.sigma) - x0 * (u.alpha * math.expm1(-at))
        d = x0 + (m(x, u) - x0) * (h / (2 * at))
        x = start * (t.sigma / s.sigma) - d * (t.alpha * math.expm1(-h))
    return m.program(x)


@sampler()
def dpmpp_2m_sde(m: Any, grid: Grid, eta: float = 1.0, kind: str = "midpoint", lower_final: bool = True) -> Any:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix C). kind: "midpoint" or "heun"; eta: 0 is the ODE."""
    eta, kind = number("eta", eta, 0), one_of("kind", kind, ("midpoint", "heun"))
    x, past = m.start(), None
    for i, (s, t) in enumerate(m.steps()):
        x0, h = m(x, s), s.to(t)
        gain, left = -math.expm1(-h * (1 + eta**2)), math.exp(-h * eta**2) if eta > 0 else 1.0  # h may be infinite
        x = x * (t.sigma / s.sigma * left) + x0 * (t.alpha * gain)
        if past is not None and math.isfinite(h) and not (lower_final and i == len(grid) - 1):
            before, lam = past
            weight = gain / 2 if kind == "midpoint" else 1 - gain / (h * (1 + eta**2))
            x = x + (x0 - before) * (t.alpha * weight * h / (s.lam - lam))
        if t.sigma > 0 and eta > 0:
            x = x + m.z(s, t) * (t.sigma * math.sqrt(-math.expm1(-2 * h * eta**2)))
        past = (x0, s.lam)
    return m.program(x)


@sampler(steps=10, calls=2)
def dpmpp_sde(m: Any, grid: Grid, eta: float = 1.0, r: float = 0.5) -> Any:
    """SDE-DPM-Solver++ of two calls a step, in y = x / alpha (Lu et al. 2022b, appendix C; k-diffusion's form).

    The noise of a step is the sum of those of its halves.
    """
    eta, r = number("eta", eta, 0), number("r", r, 0.01, 0.99)
    x = m.start()
    for s, t in m.steps():
        x0, u = m(x, s), grid.process.between(s, t, r)
        if u is None:
            x = x * (t.sigma / s.sigma) - x0 * (t.alpha * math.expm1(-s.to(t)))
            continue
        y, (z_1, z_2) = m.keep(x) / s.alpha, m.z_halves(s)
        down, up = ancestral(s.rho, u.rho, eta)
        x = (y * (down / s.rho) + x0 * (1 - down / s.rho) + z_1 * up) * u.alpha
        x0 = m(x, u)
        down, up = ancestral(s.rho, t.rho, eta)
        x = (y * (down / s.rho) + x0 * (1 - down / s.rho) + (z_1 + z_2) * (up / math.sqrt(2))) * t.alpha
    return m.program(x)


def ancestral(s: float, t: float, eta: float) -> tuple[float, float]:
    """(down, up) of a step of rho from s to t: go down without noise, and up to t by noise of that deviation."""
    up = min(t, eta * math.sqrt(max(0.0, t**2 * (s**2 - t**2) / s**2)))
    return math.sqrt(max(0.0, t**2 - up**2)), up
