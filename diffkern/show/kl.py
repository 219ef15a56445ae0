"""A Gaussian fitted to two modes by either direction of the Kullback-Leibler divergence.

    forward KL(p || q) = E_p[ln p - ln q]    covers both modes: the best q has the mean and the variance of p
    reverse KL(q || p) = E_q[ln q - ln p]    seeks one: q pays for every place where p is small

Integrals are sums over a grid, on which both densities are smooth and fall to 0. The second fit is a minimum that
L-BFGS finds from each mode; the better one is shown.
"""

import math

import torch
from torch import Tensor

from . import Figure, Panel
from .gaussians import Gaussians

DATA = Gaussians([[-2.0], [2.0]], [0.5, 0.7], [0.4, 0.6])
COLUMNS = ("q", "mean", "std", "forward KL, nats", "reverse KL, nats")
LIMIT = 30.0


def grid(size: int) -> Tensor:
    return torch.linspace(-LIMIT, LIMIT, size, dtype=torch.float64, device="cpu")


def normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln N(x; mean, std^2)."""
    return -((x - mean) * (-log_std).exp()).square() / 2 - log_std - math.log(2 * math.pi) / 2


def divergence(log_p: Tensor, log_q: Tensor, x: Tensor) -> Tensor:
    """KL(p || q) in nats, of densities on a grid."""
    return (log_p.exp() * (log_p - log_q)).sum() * (x[1] - x[0])


def covering(data: Gaussians) -> Tensor:
    """(mean, ln std) of the q with the least KL(p || q): the moments of p."""
    mean = data.weights @ data.means[:, 0]
    variance = data.weights @ (data.stds.square() + (data.means[:, 0] - mean).square())
    return torch.stack((mean, variance.log() / 2))


def seeking(data: Gaussians, x: Tensor) -> Tensor:
    """(mean, ln std) of the q with the least KL(q || p)."""
    log_p, found = data.log_prob(x[:, None]), []
    for mean, std in zip(data.means[:, 0], data.stds, strict=True):
        q = torch.stack((mean, std.log())).requires_grad_()
        optimizer = torch.optim.LBFGS([q], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def loss(q: Tensor = q, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = divergence(normal(x, *q), log_p, x)
            value.backward()
            return value

        optimizer.step(loss)
        found.append((loss().item(), q.detach()))
    return min(found, key=lambda pair: pair[0])[1]


def figure(n: int = 2001) -> Figure:
    """On a grid of n points. Raises ValueError for fewer than 601, which are too far apart."""
    if n < 601:
        raise ValueError(f"n: expected at least 601 points of a grid, got {n}")
    x = grid(n)
    log_p = DATA.log_prob(x[:, None])
    rows, lines = [], {"p": (x, log_p.exp())}
    for name, q in (("covers: least forward KL", covering(DATA)), ("seeks: least reverse KL", seeking(DATA, x))):
        log_q = normal(x, *q)
        both = divergence(log_p, log_q, x).item(), divergence(log_q, log_p, x).item()
        rows.append((name, q[0].item(), q[1].exp().item(), *both))
        lines[name] = x, log_q.exp()
    return Figure(
        COLUMNS, rows, [Panel("one Gaussian for two modes", lines=lines, axes=dict(xlabel="x", xlim=(-6, 6)))]
    )
