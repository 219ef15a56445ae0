"""Closed forms: data whose exact denoiser is known, and what every sampler must then do.

For data N(m, s^2) the marginal at alpha_bar is N(sqrt(ab) m, v), v = ab s^2 + 1 - ab, the exact denoiser is
x0_hat = m + k (x - sqrt(ab) m) with k = sqrt(ab) s^2 / v, and every sampler is affine in x.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from diffkern.schedule import Schedule

mp.dps = 40

SCHEDULES = {
    "linear": Schedule.linear(),
    "linear_100": Schedule.linear(100, 1e-3, 0.2),
    "scaled_linear": Schedule.scaled_linear(),
    "sigmoid": Schedule.sigmoid(),
    "cosine": Schedule.cosine(),
    "cosine_50": Schedule.cosine(50),
    "custom": Schedule([0.5, 1e-7, 0.9, 0.3, 1e-3]),
    "one_step": Schedule([0.25]),
}
SPACINGS = ("trailing", "leading", "linspace", "quadratic")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For modules whose tensors are so small that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subsequences(schedule: Schedule) -> list[list[int]]:
    """A hundred steps or all, few of them by every spacing, and an uneven choice."""
    few = [schedule.timesteps(N, s) for s in SPACINGS for N in (1, 2, 7, 10) if schedule.T >= N]
    return [
        schedule.timesteps(min(100, schedule.T)),
        *few,
        sorted({schedule.T - 1, schedule.T // 3, schedule.T // 5}, reverse=True),
    ]


def head(prediction: str, x: Tensor, x_0: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the output of a network of that prediction whose x0_hat at x_t = x is x_0."""
    a, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    eps = (x - a * x_0) / sigma
    return {"eps": eps, "x0": x_0, "v": a * eps - sigma * x_0, "score": -eps / sigma}[prediction]


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2), each element on its own; std = 0 is a point mass."""

    mean: float = 0.3
    std: float = 0.5

    def variance(self, alpha_bar):
        """v, of x_t."""
        return alpha_bar * self.std**2 + 1 - alpha_bar

    def x_0(self, x, alpha_bar):
        """E[x_0 | x_t = x]."""
        a = alpha_bar**0.5
        return self.mean + a * self.std**2 / self.variance(alpha_bar) * (x - a * self.mean)

    def network(self, schedule: Schedule, prediction: str = "eps") -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The perfect network, computed in float64."""

        def network(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
            x = x_t.double()
            return head(prediction, x, self.x_0(x, alpha_bar), alpha_bar).float()

        return network

    def out(self, schedule: Schedule, timesteps: Sequence[int], prediction: str) -> tuple[Tensor, Tensor]:
        """(gain, offset): the perfect network's output at each step is gain x + offset."""
        alpha_bar = schedule.alpha_bar[list(timesteps)]
        zero, one = torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)
        offset = head(prediction, zero, self.x_0(zero, alpha_bar), alpha_bar)
        return head(prediction, one, self.x_0(one, alpha_bar), alpha_bar) - offset, offset


def propagate(
    table: Tensor, out_gain: Tensor, out_offset: Tensor, mean: float = 0.0, variance: float = 1.0
) -> tuple[float, float]:
    """Mean and variance after all rows of a table, the network being out = out_gain x + out_offset."""
    p_x, p_o, k_x, k_o, k_0, sigma, *_ = table.unbind(1)
    gain = k_x + k_o * out_gain + k_0 * (p_x + p_o * out_gain)
    offset = k_o * out_offset + k_0 * p_o * out_offset
    for g, b, s in zip(gain.tolist(), offset.tolist(), sigma.tolist(), strict=True):
        mean, variance = g * mean + b, g * g * variance + s * s
    return mean, variance


# --- closed forms at 40 digits; alpha_bars are those visited, decreasing in t's order, with 1 at the end ---


def mp_alpha_bar(schedule: Schedule, timesteps: Sequence[int]) -> list[mpf]:
    """prod (1 - beta_s) up to each of ``timesteps``, and 1 for x_0."""
    products = _products(tuple(schedule.betas.tolist()))
    return [*(products[t] for t in timesteps), mpf(1)]


@functools.cache
def _products(betas: tuple[float, ...]) -> list[mpf]:
    return list(itertools.accumulate((1 - mpf(beta) for beta in betas), operator.mul))


def ddpm_moments(data: Gaussian, alpha_bars: list[mpf], variance: str) -> tuple[mpf, mpf]:
    """Ancestral sampling from N(0, 1): the steps' gains sqrt(alpha) v_prev / v telescope."""
    m, s2 = mpf(data.mean), mpf(data.std) ** 2

    def v(ab):
        return ab * s2 + 1 - ab

    def gain(ab):  # from alpha_bar to the end
        return mp.sqrt(ab) * s2 / v(ab)

    mean = m * (1 - gain(alpha_bars[0]) * mp.sqrt(alpha_bars[0]))
    total = gain(alpha_bars[0]) ** 2
    for ab, prev in zip(alpha_bars, alpha_bars[1:], strict=False):
        beta = 1 - ab / prev
        sigma2 = {
            "fixed_small": beta * (1 - prev) / (1 - ab),
            "fixed_large": beta if prev < 1 else mpf(0),
            "optimal": v(prev) * beta / v(ab),
        }[variance]
        total += gain(prev) ** 2 * sigma2
    return mean, total


def ddim_moments(data: Gaussian, alpha_bars: list[mpf], eta: float) -> tuple[mpf, mpf]:
    """DDIM from N(0, 1): each step's gain is (sqrt(ab_prev ab) s^2 + d sqrt(1 - ab)) / v."""
    m, s2, eta = mpf(data.mean), mpf(data.std) ** 2, mpf(eta)
    product, total = mpf(1), mpf(1)
    for ab, prev in zip(alpha_bars, alpha_bars[1:], strict=False):
        sigma2 = eta**2 * (1 - prev) / (1 - ab) * (1 - ab / prev)
        d = mp.sqrt(1 - prev - sigma2)
        gain = (mp.sqrt(prev * ab) * s2 + d * mp.sqrt(1 - ab)) / (ab * s2 + 1 - ab)
        product, total = product * gain, total * gain**2 + sigma2
    return m * (1 - product * mp.sqrt(alpha_bars[0])), total


# --- whole runs in float64, from the papers' equations and known noise ---


def ddpm_trajectory(
    x: Tensor, z: Sequence[Tensor], x_0: Callable[[Tensor, Tensor], Tensor], alpha_bars: Tensor, variance: str
) -> list[tuple[Tensor, Tensor]]:
    """Ho et al. 2020, eqs. 6 and 7: (x_t, x0_hat) at each step, and (x_0, x_0) last."""
    states = []
    for i, (ab, prev) in enumerate(zip(alpha_bars, alpha_bars[1:], strict=False)):
        beta = 1 - ab / prev
        x0_hat = x_0(x, ab)
        states.append((x, x0_hat))
        mean = (prev.sqrt() * beta * x0_hat + (ab / prev).sqrt() * (1 - prev) * x) / (1 - ab)
        sigma2 = {"fixed_small": beta * (1 - prev) / (1 - ab), "fixed_large": beta if prev < 1 else 0 * beta}[variance]
        x = mean + sigma2.sqrt() * z[i]
    return [*states, (x, x)]


def ddim_trajectory(
    x: Tensor, z: Sequence[Tensor], x_0: Callable[[Tensor, Tensor], Tensor], alpha_bars: Tensor, eta: float
) -> list[tuple[Tensor, Tensor]]:
    """Song et al. 2021, eqs. 12 and 16: (x_t, x0_hat) at each step, and (x_0, x_0) last."""
    states = []
    for i, (ab, prev) in enumerate(zip(alpha_bars, alpha_bars[1:], strict=False)):
        x0_hat = x_0(x, ab)
        states.append((x, x0_hat))
        eps = (x - ab.sqrt() * x0_hat) / (1 - ab).sqrt()
        sigma = eta * ((1 - prev) / (1 - ab)).sqrt() * (1 - ab / prev).sqrt()
        x = prev.sqrt() * x0_hat + (1 - prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * z[i]
    return [*states, (x, x)]


def dpmpp_2m_trajectory(
    x: Tensor, x_0: Callable[[Tensor, Tensor], Tensor], alpha_bars: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Lu et al. 2022, algorithm 2, first order at both ends: (x_t, x0_hat) at each step, and (x_0, x_0) last."""
    a, sigma = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()
    lam = (a / sigma).log()
    states, last = [], len(alpha_bars) - 2
    for i, ab in enumerate(alpha_bars[:-1]):
        x0_hat = x_0(x, ab)
        h, D = lam[i + 1] - lam[i], x0_hat
        if 0 < i < last:
            r = (lam[i] - lam[i - 1]) / h
            D = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * states[-1][1]
        states.append((x, x0_hat))
        x = sigma[i + 1] / sigma[i] * x - a[i + 1] * ((-h).exp() - 1) * D
    return [*states, (x, x)]


def normals(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Standard normals [n, d] float64."""
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
