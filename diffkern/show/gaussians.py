"""Mixtures of Gaussians, whose density is known at every noise level, and with it the network that training aims at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Model
from ..prediction import target
from ..process import Process
from . import Panel


@dataclass(frozen=True, eq=False)
class Gaussians:
    """sum_k weights_k N(means_k, stds_k^2 I), in D dimensions.

    means    K points of D numbers
    stds     K numbers
    weights  K numbers whose sum is 1; None: equal ones
    labels   the class of each of the K Gaussians, 0 and up; None: there are no classes

    All four become tensors on the CPU, float64 and int64. Raises ValueError where their shapes do not fit.
    """

    means: Sequence[Sequence[float]]
    stds: Sequence[float]
    weights: Sequence[float] | None = None
    labels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        K = len(self.stds)
        weights = [1 / K] * K if self.weights is None else self.weights
        for name, value in (("means", self.means), ("stds", self.stds), ("weights", weights)):
            object.__setattr__(self, name, torch.as_tensor(value, dtype=torch.float64, device="cpu"))
        if self.labels is not None:
            object.__setattr__(self, "labels", torch.as_tensor(self.labels, dtype=torch.int64, device="cpu"))
        if self.means.ndim != 2:
            raise ValueError(f"means: expected shape (K, D), got {tuple(self.means.shape)}")
        for name in ("stds", "weights", "labels"):
            value = getattr(self, name)
            if value is not None and value.shape != (len(self.means),):
                raise ValueError(f"{name}: expected shape ({len(self.means)},), got {tuple(value.shape)}")

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw points [n, D], float32, and the number of the Gaussian that each is of, int64 [n]."""
        generator = torch.Generator("cpu").manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, device="cpu", generator=generator)
        return (self.means[k] + self.stds[k, None] * z).float(), k

    def variances(self, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """The variance of each Gaussian of x_t = alpha x_0 + sigma eps: [K]."""
        return (alpha * self.stds) ** 2 + sigma**2

    def log_parts(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """ln(weights_k N(x; ...)) of each Gaussian of x_t: float64 [N, K]."""
        variances = self.variances(alpha, sigma)
        squares = (x.double()[:, None] - alpha * self.means).square().sum(2)
        return self.weights.log() - (squares / variances + x.shape[1] * (2 * math.pi * variances).log()) / 2

    def log_prob(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """ln of the density of x_t at x [N, D]: float64 [N]."""
        return self.log_parts(x, alpha, sigma).logsumexp(1)

    def cdf(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """P(x_t <= x) of one-dimensional data at x [N]: float64 [N]."""
        z = (x.double()[:, None] - alpha * self.means[:, 0]) / self.variances(alpha, sigma).sqrt()
        return torch.special.ndtr(z) @ self.weights

    def quantile(self, p: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """The x at which :meth:`cdf` is p, for p [N] in (0, 1): float64 [N], by bisection."""
        stds, means = self.variances(alpha, sigma).sqrt(), alpha * self.means[:, 0]
        low, high = (torch.full_like(p, end, dtype=torch.float64)
                     for end in ((means - 40 * stds).min().item(), (means + 40 * stds).max().item()))  # fmt: skip
        for _ in range(64):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha, sigma) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def distance(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> float:
        """sup |F_n - F| of points [n] and the exact distribution of x_t (Kolmogorov & Smirnov)."""
        exact = self.cdf(x.double().sort().values, alpha, sigma)
        steps = torch.arange(len(x) + 1, dtype=torch.float64, device="cpu") / len(x)
        return max((steps[1:] - exact).max().item(), (exact - steps[:-1]).max().item())

    def predict(self, x: Tensor, alpha: float, sigma: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t = x] and E[eps | x_t = x], float64 [N, D].

        labels  int64 [N], the class that each x is known to be of; -1 or None where it is not known. Raises ValueError
                where there are no classes
        """
        if labels is not None and self.labels is None:
            raise ValueError("labels: expected None of a mixture without classes, got a tensor")
        parts = self.log_parts(x, alpha, sigma)
        if labels is not None:
            others = (labels[:, None] >= 0) & (labels[:, None] != self.labels)
            parts = parts.masked_fill(others, -math.inf)
        share, variances = parts.softmax(1)[..., None], self.variances(alpha, sigma)[:, None]
        away = (x.double()[:, None] - alpha * self.means) / variances
        x0 = (share * (self.means + alpha * self.stds[:, None] ** 2 * away)).sum(1)
        return x0, sigma * (share * away).sum(1)

    def model(self, process: Process, prediction: str = "eps") -> Model:
        """Make a :class:`diffkern.Model` of the exact network, for a process whose network is told t itself: a
        ``Schedule`` or ``RectifiedFlow()``."""

        def network(x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            out = torch.empty_like(x_t)
            for time in t.unique():
                s, rows = process.point(time.item()), t == time
                x0, eps = self.predict(x_t[rows], s.alpha, s.sigma, None if labels is None else labels[rows])
                y_x, y_e = map(float, target(prediction, s.alpha, s.sigma, **process.head_constants(prediction, s)))
                out[rows] = (y_x * x0 + y_e * eps).to(x_t.dtype)
            return out

        classes = None if self.labels is None else tuple(map(str, range(int(self.labels.max()) + 1)))
        return Model(network, process, prediction, (self.means.shape[1],), classes, "gaussians", clip=False)


def critical(n: int) -> float:
    """The 99% quantile of :meth:`Gaussians.distance` for n points of the exact distribution."""
    return 1.628 / math.sqrt(n)


def plane(title: str, data: Gaussians, points: Mapping[str, Tensor], limit: float) -> Panel:
    """Points over the density of two-dimensional data, in the square from -limit to limit."""
    side = torch.linspace(-limit, limit, 100, dtype=torch.float64, device="cpu")
    density = data.log_prob(torch.cartesian_prod(side, side)).exp().view(100, 100).T  # [y, x]
    axes = dict(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return Panel(title, density, (-limit, limit, -limit, limit), points=points, axes=axes)
