"""A detector that tells samples from data, trained on one half of them and tried on the other."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import epoch_order

DECAY = 0.01  # times half the squared norm of the weights, added to the mean loss
NEWTON_STEPS, SMALL = 50, 1e-9  # at most; and the gradient at which to stop
Z = 1.96  # standard errors in a 95% interval


@dataclass(frozen=True)
class Detection:
    """The share of held-out images that the detector gets right, and its 95% interval; 0.5 is chance."""

    accuracy: float
    low: float
    high: float


def detector(real: Tensor, drawn: Tensor, *, seed: int = 0) -> Detection:
    """Train a logistic regression to tell samples from data (a classifier two-sample test, Lopez-Paz & Oquab 2017).

    real, drawn  features [K, D] and [L, D], 4 or more of each; as many of both are taken, in an order by ``seed``

    Features are standardized by the first half, which the weights are fitted to, in float64. The interval is
    Wilson's (1927) for the other half, and holds for these samples and this detector: another one may see more.
    Raises ValueError.
    """
    for name, x in (("real", real), ("drawn", drawn)):
        if x.ndim != 2 or len(x) < 4 or x.shape[1] != real.shape[-1]:
            raise ValueError(f"{name}: expected features [at least 4, {real.shape[-1]}], got {tuple(x.shape)}")
    n = min(len(real), len(drawn))
    halves: tuple[list[Tensor], list[Tensor]] = [], []
    for x in (real, drawn):
        order = epoch_order(len(x), 0, seed)[:n].to(x.device)
        halves[0].append(x[order[: n // 2]].double())
        halves[1].append(x[order[n // 2 :]].double())
    fitted, tried = (torch.cat(half) for half in halves)
    mean, std = fitted.mean(0), fitted.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a feature that is constant tells nothing
    weight, bias = _logistic((fitted - mean) / std, _truth(halves[0]))
    right = ((((tried - mean) / std) @ weight + bias > 0) == (_truth(halves[1]) > 0)).double()
    accuracy = right.mean().item()
    return Detection(accuracy, *wilson(accuracy, len(right)))


def _truth(parts: list[Tensor]) -> Tensor:
    """0 of data, 1 of samples."""
    return torch.cat([torch.full_like(part[:, 0], value) for part, value in zip(parts, (0.0, 1.0), strict=True)])


def _logistic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The weights [D] and the bias [] of a logistic regression with weight decay, by Newton's method.

    The loss is convex; a step that would raise it is halved.
    """
    x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    decay = torch.full_like(x[0], DECAY)
    decay[-1] = 0.0  # of the bias
    w = torch.zeros_like(x[0])

    def loss(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + (decay * w.square()).sum() / 2

    for _ in range(NEWTON_STEPS):
        p = (x @ w).sigmoid()
        gradient = x.T @ (p - y) / len(x) + decay * w
        if gradient.abs().max() < SMALL:
            break
        hessian = (x * (p * (1 - p) / len(x))[:, None]).T @ x + decay.diag()
        step = torch.linalg.solve(hessian, gradient)
        while loss(w - step) > loss(w) and step.abs().max() > SMALL:
            step = step / 2
        w = w - step
    return w[:-1], w[-1]


def wilson(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """The interval of a probability of which ``share`` was seen in n trials (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half
