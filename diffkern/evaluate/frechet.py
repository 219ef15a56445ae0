"""The Frechet distance between the Gaussians of two sets of features."""

from functools import cached_property

import torch
from torch import Tensor

BLOCK = 4096  # features that are float64 at a time


class Moments:
    """Count, mean [D] and covariance [D, D] of features that come in parts, in float64.

    Parts are merged by their deviations from their means (Chan et al. 1983), so that no digits are lost to a large
    mean. The result depends on the parts to rounding.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = self._scatter = torch.zeros(0, dtype=torch.float64, device="cpu")

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Return the moments of features [N, D], computed in blocks."""
        moments = cls()
        for part in features.split(BLOCK):
            moments.update(part)
        return moments

    def update(self, features: Tensor) -> None:
        """Take in more features [N, D]."""
        x = features.detach().double()
        k, mean = len(x), x.mean(0)
        x = x - mean
        scatter = x.T @ x
        if self.n:
            apart = mean - self.mean
            scatter += self._scatter + apart.outer(apart) * (self.n * k / (self.n + k))
            mean = self.mean + apart * (k / (self.n + k))
        self.n, self.mean, self._scatter = self.n + k, mean, scatter
        self.__dict__.pop("root", None)

    @property
    def covariance(self) -> Tensor:
        return self._scatter / (self.n - 1)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance; eigenvalues below 0 are rounding, and count as 0."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Between the Gaussians of two sets of features [K, D] and [L, D] (Dowson & Landau 1982; Heusel et al. 2017).

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64. The roots are of symmetric matrices, by
    eigenvalues with those below 0 (rounding) taken as 0, so that singular covariances are no trouble.
    Raises ValueError for sets of one feature or of different widths.
    """
    width = a.shape[-1] if isinstance(a, Tensor) else len(a.mean)
    for name, x in (("a", a), ("b", b)):
        shape = tuple(x.shape) if isinstance(x, Tensor) else (x.n, len(x.mean))
        if len(shape) != 2 or shape[0] < 2 or shape[1] != width:
            raise ValueError(f"{name}: expected features [at least 2, {width}], got {shape}")
    a, b = (Moments.of(x) if isinstance(x, Tensor) else x for x in (a, b))
    cross = torch.linalg.eigvalsh(a.root @ b.covariance @ a.root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return max(0.0, ((a.mean - b.mean).square().sum() + traces - 2 * cross).item())
