"""Samplers of the reverse SDE in t or rho: Euler-ancestral, Euler-Maruyama, predictor-corrector, annealed Langevin."""

import math
from typing import Any

from ..process import Grid, checked_count
from .dpm_solver import ancestral
from .options import number
from .registry import sampler


@sampler()
def euler_a(m: Any, grid: Grid, eta: float = 1.0) -> Any:
    """Euler's steps in rho that go lower and come back by noise, in y = x / alpha. eta: 0 is ``euler``."""
    eta = number("eta", eta, 0)
    x = m.start()
    for s, t in m.steps():
        e, (down, up) = m.eps(x, s), ancestral(s.rho, t.rho, eta)
        x = (x / s.alpha + e * (down - s.rho)) * t.alpha
        if up > 0:
            x = x + m.z(s, t) * (up * t.alpha)
    return m.program(x)


def _euler_in_time(m: Any, grid: Grid, noise: bool) -> Any:
    x = m.start()
    for s, t in m.steps():
        e = m.eps(x, s)
        if t.sigma == 0:
            x = (x - e * s.sigma) / s.alpha * t.alpha
            continue
        (f, g2), dt = grid.process.drift_and_diffusion(s.time), t.time - s.time
        x = x * (1 + f * dt) + e * (g2 * dt / s.sigma * (1.0 if noise else 0.5))  # the score is -e / sigma
        if noise:
            x = x + m.z(s, t) * math.sqrt(g2 * -dt)
    return m.program(x)


@sampler(steps=250)
def sde(m: Any, grid: Grid) -> Any:
    """The reverse SDE dx = (f x - g^2 score) dt + g dw by Euler-Maruyama (Song et al. 2021b, eq. 6)."""
    return _euler_in_time(m, grid, noise=True)


@sampler(steps=250)
def pf_ode(m: Any, grid: Grid) -> Any:
    """The probability-flow ODE dx = (f x - g^2 score / 2) dt by Euler in t (Song et al. 2021b, eq. 13)."""
    return _euler_in_time(m, grid, noise=False)


@sampler(steps=250, calls=2)
def pc(m: Any, grid: Grid, snr: float = 0.16, corrections: int = 1) -> Any:
    """Reverse diffusion with Langevin corrections (Song et al. 2021b, algorithms 2 to 4), in y = x / alpha.

    snr  of the corrections, whose length is 2 (snr rho)^2: what the paper's ratio of norms is for white noise. The last
         step adds no noise
    """
    snr, corrections = number("snr", snr, 0), checked_count("corrections", corrections, 0)
    x = m.start()
    for i, (s, t) in enumerate(m.steps()):
        for _ in range(corrections):
            length = 2 * (snr * s.rho) ** 2
            e = m.eps(x, s)
            x = x - e * (length / s.rho * s.alpha) + m.z(s) * (math.sqrt(2 * length) * s.alpha)
        e = m.eps(x, s)
        x = (x / s.alpha - e * ((s.rho**2 - t.rho**2) / s.rho)) * t.alpha
        if i < len(grid) - 1:
            x = x + m.z(s) * (math.sqrt(s.rho**2 - t.rho**2) * t.alpha)
    return m.program(x)


@sampler(steps=50, calls=5)
def langevin(m: Any, grid: Grid, steps_a_level: int = 5, step_size: float = 0.2) -> Any:
    """Annealed Langevin dynamics in y = x / alpha (Song & Ermon 2019, algorithm 1), and a last prediction without noise
    (2020).

    step_size  relative to rho^2: a level's steps are step_size rho^2 long. 0.2 is 2e-5 at a last rho of 0.01
    """
    steps_a_level, step_size = checked_count("steps_a_level", steps_a_level), number("step_size", step_size, 0)
    x = m.start()
    for s, t in m.steps():
        for _ in range(steps_a_level):
            length = step_size * s.rho**2
            x = x - m.eps(x, s) * (length / 2 / s.rho * s.alpha) + m.z(s) * (math.sqrt(length) * s.alpha)
        x = x * (t.alpha / s.alpha) if t.sigma > 0 else m(x, s)
    return m.program(x)
