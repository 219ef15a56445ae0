"""Measures by nearest neighbours of features: precision, recall, density, coverage, and how near samples are to the
training images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..process import checked_count

K = 3  # of precision and recall (Kynkaanniemi et al. 2019)
K_DENSITY = 5  # of density and coverage (Naeem et al. 2020)
SAME = 1e-12  # of the largest squared norm: a squared distance below is rounding, and counts as 0


@dataclass(frozen=True)
class Neighbours:
    """Nearest-neighbour measures of samples against data; all but density are shares.

    precision  of samples that lie in a ball around an example (Kynkaanniemi et al. 2019, eq. 1)
    recall     of examples that lie in a ball around a sample
    density    how many balls around examples a sample lies in, as a part of k, on average (Naeem et al. 2020, eq. 4)
    coverage   of examples in whose ball a sample lies (eq. 5)
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(
    real: Tensor, drawn: Tensor, *, k: int = K, k_density: int = K_DENSITY, batch_size: int = 1000
) -> Neighbours:
    """Measure samples by the balls around points that reach to their k-th nearest neighbour in their own set.

    real, drawn  features of data and of samples, [K, D] and [L, D]: more than k of each. All numbers depend on K and L
    k            of precision and recall
    k_density    of density and coverage
    batch_size   rows of a block of distances, [batch_size, the larger set], in float64

    Raises TypeError or ValueError.
    """
    counts = {"k": checked_count("k", k), "k_density": checked_count("k_density", k_density)}
    return _neighbours(*_checked(real, drawn, max(counts.values())), **counts, batch_size=batch_size)


def precision_recall(real: Tensor, drawn: Tensor, *, k: int = K, batch_size: int = 1000) -> tuple[float, float]:
    """(precision, recall) of :func:`neighbours`, for which more than ``k`` of each are enough."""
    k = checked_count("k", k)
    found = _neighbours(*_checked(real, drawn, k), k=k, k_density=k, batch_size=batch_size)
    return found.precision, found.recall


def _neighbours(real: Tensor, drawn: Tensor, *, k: int, k_density: int, batch_size: int) -> Neighbours:
    real_radius, drawn_radius = (_radii(x, max(k, k_density), batch_size) for x in (real, drawn))
    precise, balls = 0, 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for first in range(0, len(drawn), batch_size):
        rows = slice(first, first + batch_size)
        d = _squared(drawn[rows], real)
        precise += (d <= real_radius[:, k]).any(1).sum().item()
        recalled |= (d <= drawn_radius[rows, k, None]).any(0)
        inside = d <= real_radius[:, k_density]
        balls += inside.sum().item()
        covered |= inside.any(0)
    recall, coverage = (flags.double().mean().item() for flags in (recalled, covered))
    return Neighbours(precise / len(drawn), recall, balls / (k_density * len(drawn)), coverage)


def copying(real: Tensor, drawn: Tensor, held_out: Tensor, *, batch_size: int = 1000) -> float:
    """The share of pairs of a sample and a held-out example in which the sample is nearer to its nearest training
    example; a tie counts as half (Meehan et al. 2020: the statistic of Mann & Whitney).

    real, drawn, held_out  features of the training data, of samples and of data that the model has not seen, [any, D]

    About 0.5 where samples are as near as new data are, 1 for copies. Raises ValueError.
    """
    ours, theirs = (nearest(real, x, batch_size=batch_size) for x in (drawn, held_out))
    return share_nearer(ours, theirs)


def nearest(real: Tensor, x: Tensor, *, batch_size: int = 1000) -> Tensor:
    """The squared distance of each row of ``x`` to the nearest one of ``real``, float64 [N], in blocks of both."""
    real, x = _checked(real, x, 0, "x")
    found = []
    for part in x.split(batch_size):
        by_block = [_squared(part, block).min(1).values for block in real.split(10 * batch_size)]
        found.append(torch.stack(by_block).min(0).values)
    return torch.cat(found)


def share_nearer(ours: Tensor, theirs: Tensor) -> float:
    """The share of pairs in which one of ``ours`` [N] is less than one of ``theirs`` [M]; a tie counts as half."""
    theirs = theirs.sort().values
    more, not_less = (len(theirs) - torch.searchsorted(theirs, ours, right=right) for right in (True, False))
    return ((more + not_less).double().mean() / (2 * len(theirs))).item()


def _checked(real: Tensor, drawn: Tensor, k: int, name: str = "drawn") -> tuple[Tensor, Tensor]:
    for what, x in (("real", real), (name, drawn)):
        if x.ndim != 2 or len(x) <= k or x.shape[1] != real.shape[-1]:
            raise ValueError(f"{what}: expected features [more than {k}, {real.shape[-1]}], got {tuple(x.shape)}")
    return real, drawn


def _radii(x: Tensor, k: int, batch_size: int) -> Tensor:
    """Squared distances [N, k + 1] to the nearest points of the set: column j to the j-th neighbour, 0 the point."""
    found = [_squared(part, x).topk(k + 1, dim=1, largest=False).values for part in x.split(batch_size)]
    return torch.cat(found)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, float64 [N, M], by a product of matrices: of points near their centre no digits are lost."""
    centre = b.mean(0, dtype=torch.float64)
    a, b = a.double() - centre, b.double() - centre
    norms_a, norms_b = a.square().sum(1), b.square().sum(1)
    d = torch.addmm(norms_a[:, None] + norms_b, a, b.T, alpha=-2)
    return d.masked_fill_(d < SAME * (norms_a.max() + norms_b.max()), 0.0)
