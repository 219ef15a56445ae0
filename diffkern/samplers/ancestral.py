"""Samplers that go back along the forward process: ddpm, ddim and its inversion, consistency models, RePaint."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..process import Grid, checked_count
from .options import number, one_of, variances
from .registry import sampler

UNBOUNDED = ("diagonal", "full")
LEARNED = ("learned", *UNBOUNDED)  # the variances that a network tells
VARIANCES = ("fixed_small", "fixed_large", *LEARNED)  # and "optimal", which needs data_std
SPREAD = 2.0  # log_var_max - log_var_min of an unbounded variance, whose ln is that of the large one plus v - 1


@sampler(steps=None)
def ddpm(
    m: Any,
    grid: Grid,
    variance: str | Sequence[float] | Tensor = "fixed_small",
    data_std: float | None = None,
) -> Any:
    """The posterior q(x_t | x_s, x_0) of Ho et al. 2020 (eq. 7, algorithm 2), for any process and any steps.

    variance  "fixed_small", the posterior's; "fixed_large", the forward step's; "learned", between these by the second
              half of the network's output (Nichol & Dhariwal 2021, eq. 15), all three without noise in the step to
              sigma = 0; "diagonal", e^(v - 1) times the forward step's, v being that second half (Sohl-Dickstein et al.
              2015); "full", the same with correlations between dimensions (:mod:`diffkern.covariance`); "optimal", the
              posterior's + c1^2 Var(x_0 | x_s) (Bao et al. 2022, theorem 1) of Gaussian data of the standard deviation
              ``data_std``; or one number >= 0 for each step, taken as it is
    """
    named = isinstance(variance, str | None)
    given = None if named else variances(variance, len(grid))
    if named:
        one_of("variance", variance, (*VARIANCES, "optimal"), " or a tensor of variances")
    optimal = named and variance == "optimal"
    if optimal != (data_std is not None):
        expected = "a number >= 0 with variance 'optimal'" if optimal else "None unless variance is 'optimal'"
        raise ValueError(f"data_std: expected {expected}, got {data_std!r}")
    data_var = number("data_std", data_std, 0) ** 2 if optimal else 0.0
    x = m.start()
    for i, (s, t) in enumerate(m.steps()):
        x0 = m(x, s)
        removed = grid.process.removed(s, t)
        small, large = t.sigma**2 * removed, s.sigma**2 * removed
        x = x0 * (t.alpha * removed) + x * (s.alpha / t.alpha * (t.sigma / s.sigma) ** 2)
        if given is not None:
            x = x + m.z(s, t) * math.sqrt(given[i]) if given[i] > 0 else x
        elif optimal:
            unknown = s.sigma**2 * data_var / (s.alpha**2 * data_var + s.sigma**2)  # Var(x_0 | x_s)
            x = x + m.z(s, t) * math.sqrt(small + (t.alpha * removed) ** 2 * unknown)
        elif variance in UNBOUNDED:
            most = math.log(large)
            x = x + m.z(s, t, log_var=(most - SPREAD, most), correlated=variance == "full")
        elif t.sigma > 0 and variance == "learned":
            x = x + m.z(s, t, log_var=(math.log(small), math.log(large)))
        elif t.sigma > 0:
            x = x + m.z(s, t) * math.sqrt(small if variance == "fixed_small" else large)
    return m.program(x)


@sampler(steps=50)
def ddim(m: Any, grid: Grid, eta: float = 0.0) -> Any:
    """Song et al. 2021a, eqs. 12 and 16. eta: 0 is deterministic, 1 is ``ddpm`` with the small variance."""
    eta = number("eta", eta, 0, 1)
    x = m.start()
    for s, t in m.steps():
        (x0, e), removed = m.predict(x, s), grid.process.removed(s, t)
        kept = (1 - eta**2) + eta**2 * (s.alpha * t.sigma / (t.alpha * s.sigma)) ** 2  # 1 - eta^2 removed
        x = x0 * t.alpha + e * (t.sigma * math.sqrt(kept))
        if eta > 0 and t.sigma > 0:
            x = x + m.z(s, t) * (eta * t.sigma * math.sqrt(removed))
    return m.program(x)


@sampler(steps=50)
def ddim_inversion(m: Any, grid: Grid) -> Any:
    """``ddim`` backwards (Song et al. 2021a, section 5.4), on a grid from the image up: the eps of each point left, of
    the first one reached from an image without noise."""
    x = m.start()
    for s, t in m.steps():
        at = s if s.sigma > 0 else t
        x0, e = m.predict(x, at)
        x = x0 * t.alpha + e * t.sigma if at is s else (x - e * s.sigma) / s.alpha * t.alpha + e * t.sigma
    return m.program(x)


@sampler(steps=4)
def consistency(m: Any, grid: Grid) -> Any:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): x0_hat, noised again."""
    x = m.start()
    for s, t in m.steps():
        x = m(x, s) * t.alpha
        if t.sigma > 0:
            x = x + m.z(s, t) * t.sigma
    return m.program(x)


@sampler(steps=50)
def repaint(m: Any, grid: Grid, jump: int = 10, resample: int = 10) -> Any:
    """``ddpm`` that goes back and forth for inpainting (Lugmayr et al. 2022, algorithm 1).

    jump      how many steps each stretch has
    resample  how often it is gone through
    """
    jump, resample = checked_count("jump", jump), checked_count("resample", resample)
    x, steps = m.start(), grid.steps
    for first in range(0, len(steps), jump):
        stretch = steps[first : first + jump]
        for again in reversed(range(resample if stretch[-1][1].sigma > 0 else 1)):
            for s, t in stretch:
                removed = grid.process.removed(s, t)
                x = m(x, s) * (t.alpha * removed) + x * (s.alpha / t.alpha * (t.sigma / s.sigma) ** 2)
                if t.sigma > 0:
                    x = x + m.z(s) * (t.sigma * math.sqrt(removed))
                x = m.reach(x, t)
            if again:
                s, t = stretch[0][0], stretch[-1][1]
                r = s.alpha / t.alpha
                x = x * r + m.z(t) * math.sqrt(s.sigma**2 - (r * t.sigma) ** 2)
    return m.program(x)
