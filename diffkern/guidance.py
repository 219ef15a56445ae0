"""Guidance: which outputs a network call makes, and the columns by which the kernel combines them."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops.row import LONG_COLUMNS
from .process import checked_count, checked_float
from .program import Program, Row

W, P_G, K_G, K_O, K_U = (LONG_COLUMNS.index(name) for name in ("w", "p_g", "k_g", "k_o", "k_u"))
CONVERGED = 1e-12  # of a squared norm in float32, relative to the first: what is below is rounding


@dataclass(frozen=True)
class Guidance:
    """How a condition draws the samples: by the network without it, a worse network, a classifier or a measurement.

    weight       w of out_null + w (out - out_null) (Ho & Salimans 2022): 1 is the conditional model, 0 the
                 unconditional one, each one pass through the network; any other w takes two. A list has one for each
                 sample. With a classifier or a measurement: the scale of its gradient
    interval     (low, high) of sigma / alpha within which to guide (Kynkaanniemi et al. 2024); elsewhere w is 1, and
                 there is no gradient
    rescale      phi of Lin et al. 2024, eq. 15 and 16: how far to bring the standard deviation of each sample's output
                 back to the conditional one's
    negative     labels in place of the null class
    plus_plus    CFG++ (Chung et al. 2024): step by the unconditional noise; w in [0, 1]
    network      a worse network in place of the null class (autoguidance, Karras et al. 2024)
    classifier   (x_t, t, labels) -> logits [N, K] or log p(y | x_t) [N], or the name or file of a
                 :class:`diffkern.classifier.NoisyClassifier`. The network gets the null class where it has one: the
                 labels are the classifier's matter
    form         of a classifier's or measurement's gradient g: "score", x0_hat + w sigma^2 / alpha g, with any sampler;
                 or "mean", mean + w var g, with samplers that draw noise (Dhariwal & Nichol 2021, algorithm 1)
    measurement  x0_hat -> log p(y | x0_hat) [N]: its gradient goes through the network (DPS, Chung et al. 2023); or a
                 :class:`PiGDM`
    """

    weight: float | Sequence[float] | Tensor = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    negative: Any = None
    plus_plus: bool = False
    network: Callable[..., Tensor] | None = None
    classifier: Callable[..., Tensor] | str | os.PathLike | None = None
    form: str = "score"
    measurement: "Callable[[Tensor], Tensor] | PiGDM | None" = None

    def __post_init__(self) -> None:
        expected = "guidance: expected a finite number, or one for each sample"
        try:
            weights = torch.as_tensor(self.weight, dtype=torch.float64, device="cpu")
        except (OverflowError, RuntimeError, TypeError, ValueError):
            raise TypeError(f"{expected}, got {self.weight!r}") from None
        if weights.ndim > 1 or not weights.isfinite().all():
            raise ValueError(f"{expected}, got {self.weight!r}")
        object.__setattr__(self, "weight", weights.item() if weights.ndim == 0 else weights)
        checked_float("rescale", self.rescale, "a number in [0, 1]", lambda value: 0 <= value <= 1)
        if self.form not in ("score", "mean"):
            raise ValueError(f"form: expected 'score' or 'mean', got {self.form!r}")
        if self.interval is not None:
            if not isinstance(self.interval, tuple | list) or len(self.interval) != 2:
                raise TypeError(f"interval: expected (low, high), got {self.interval!r}")
            low, high = (checked_float("interval", end, "two numbers", lambda end: True) for end in self.interval)
            if low > high:
                raise ValueError(f"interval: expected (low, high), got {self.interval!r}")
        for name, kinds in dict(network=(), classifier=(str, os.PathLike), measurement=()).items():
            value = getattr(self, name)
            if not (value is None or callable(value) or isinstance(value, kinds)):
                raise TypeError(f"{name}: expected a callable, got {value!r}")
        if sum(option is not None for option in (self.negative, self.network, self.classifier, self.measurement)) > 1:
            raise ValueError("guidance: expected one of negative, network, classifier and measurement, got several")
        if self.by_gradient and (self.rescale or self.plus_plus):
            raise ValueError("guidance: expected no rescale and no plus_plus with a classifier or a measurement")

    def log_p(self, x0_hat: Tensor, rho: Tensor) -> Tensor:
        """Return the measurement's log-likelihood: [N], of x0_hat [N, ...] at rho = sigma / alpha, []."""
        return self.measurement(x0_hat, rho) if isinstance(self.measurement, PiGDM) else self.measurement(x0_hat)

    @property
    def by_gradient(self) -> bool:
        return self.classifier is not None or self.measurement is not None

    def at(self, row: Row) -> bool:
        """Whether a row's call is guided."""
        if row.point is None:
            return False
        low, high = self.interval or (0.0, math.inf)
        return low <= row.point.rho <= high

    @property
    def one_weight(self) -> bool:
        """Whether all samples have one weight."""
        return not isinstance(self.weight, Tensor)

    def outputs(self, row: Row) -> tuple[bool, bool]:
        """(whether the call makes the output with its condition, and the one to compare it with)."""
        if self.classifier is not None:
            return False, True
        if self.by_gradient or not self.at(row) or (self.one_weight and self.weight == 1 and not self.plus_plus):
            return True, False
        if self.one_weight and self.weight == 0 and not self.plus_plus and self.network is None:
            return False, True
        return True, True

    def fill(self, table: Tensor, program: Program) -> Tensor:
        """``table`` of the program with the columns w, p_g and k_g, in place. ValueError where nothing would guide."""
        if self.by_gradient and self.form == "mean" and not any(row.sigma > 0 for row in program.rows):
            raise ValueError("form: expected 'score' with a sampler that draws no independent noise, got 'mean'")
        for values, row in zip(table, program.rows, strict=True):
            both = all(self.outputs(row))
            if not both:  # the only output is the unconditional one too
                values[K_O], values[K_U] = values[K_O] + values[K_U], 0.0
            values[W] = self.weight if both and self.one_weight else 1.0
            if self.by_gradient and self.at(row):
                scale = self.weight if self.one_weight else 1.0
                if self.form == "score":
                    if row.point.alpha == 0:
                        raise ValueError(
                            "guidance: expected a run that starts at alpha > 0, for a gradient, got alpha = 0"
                        )
                    values[P_G] = scale * row.point.sigma**2 / row.point.alpha
                elif row.noise is not None:
                    learned = row.noise.log_var is not None
                    values[K_G] = scale * row.noise.count * (1.0 if learned else row.sigma**2)
        return table

    def check(self, program: Program) -> None:
        """ValueError for a program (not folded) that CFG++ is not defined for: every step must add eps to x0_hat."""
        if not self.plus_plus:
            return
        weights = torch.as_tensor(self.weight, dtype=torch.float64, device="cpu")
        if not ((weights >= 0) & (weights <= 1)).all():
            raise ValueError(f"guidance: expected a weight in [0, 1] with plus_plus, got {self.weight}")
        for row in program.rows:
            ends = row.reached is not None and row.reached.sigma == 0
            if row.point is not None and not ends and (row.k_u == 0 or row.k_0 == 0):
                raise ValueError("plus_plus: expected a sampler that adds eps to x0_hat in each step, as 'ddim'")


@dataclass(frozen=True, eq=False)
class PiGDM:
    """A linear measurement y = H x_0 + noise, for ``Guidance(measurement=...)`` (Song et al. 2023, section 3).

    x_0 given x_t is taken to be N(x0_hat, r^2), where r^2 = s^2 sigma^2 / (s^2 alpha^2 + sigma^2), s = ``data_std``.
    So p(y | x_t) is N(y; H x0_hat, r^2 H H^T + noise_std^2), and its gradient, by the network, is exact for data that
    are N(m, s^2). Without noise it is H^+ (y - H x0_hat) / r^2 times the network's derivative.

    forward     H: [N, ...] -> [N, ...], linear and differentiable, each sample for itself
    y           [N or 1, ...], of a batch of N samples: 1 for one that all share; for a CUDA graph on its device
    noise_std   of the noise of each element of y
    data_std    of the data; 1 is the paper's
    iterations  of conjugate gradients: one is exact where H H^T is a multiple of the identity (a mask, a mean of
                pixels); at most as many as y has elements

    Raises TypeError or ValueError.
    """

    forward: Callable[[Tensor], Tensor]
    y: Tensor
    noise_std: float = 0.0
    data_std: float = 1.0
    iterations: int = 10

    def __post_init__(self) -> None:
        if not callable(self.forward):
            raise TypeError(f"forward: expected a callable, got {type(self.forward).__name__}")
        if not isinstance(self.y, Tensor) or not self.y.is_floating_point():
            got = self.y.dtype if isinstance(self.y, Tensor) else type(self.y).__name__
            raise TypeError(f"y: expected a floating-point tensor, got {got}")
        checked_float("noise_std", self.noise_std, "a number >= 0", lambda value: value >= 0)
        checked_float("data_std", self.data_std, "a number > 0", lambda value: value > 0)
        checked_count("iterations", self.iterations)

    def __call__(self, x0_hat: Tensor, rho: Tensor) -> Tensor:
        """Return [N] values with the gradient of ln p(y | x_t), for x0_hat [N, ...] at rho = sigma / alpha, []."""
        with torch.enable_grad():
            x = x0_hat.detach().requires_grad_()
            seen = self.forward(x)
        y = self.y.to(seen)
        if y.ndim != seen.ndim or y.shape[1:] != seen.shape[1:] or len(y) not in (1, len(seen)):
            raise ValueError(f"y: expected the shape that forward gives, {tuple(seen.shape)}, got {tuple(y.shape)}")

        def transposed(v: Tensor) -> Tensor:
            return torch.autograd.grad(seen, x, v, retain_graph=True)[0]

        # H^T (r^2 H H^T + noise_std^2)^-1 b = u / r^2 where (H^T H + damping) u = H^T b, which has a solution even if
        # no image has that y.
        variance = 1 / (1 / self.data_std**2 + 1 / rho.square())
        with torch.no_grad():
            u = _least_squares(self.forward, transposed, y - seen, self.noise_std**2 / variance, self.iterations)
        return _dot(u / variance, x0_hat)


def _least_squares(
    matrix: Callable[[Tensor], Tensor],
    transposed: Callable[[Tensor], Tensor],
    b: Tensor,
    damping: Tensor,
    iterations: int,
) -> Tensor:
    """The u of least |matrix u - b|^2 + damping |u|^2 for each sample, by conjugate gradients (CGLS, Bjorck 1996,
    section 7.4). The host looks at no value, as a CUDA graph needs it."""
    residual, direction = b, transposed(b)
    u, size = torch.zeros_like(direction), _dot(direction, direction)
    least = CONVERGED * size
    for _ in range(iterations):
        moved = matrix(direction)
        step = _ratio(size, _dot(moved, moved) + damping * _dot(direction, direction))
        u, residual = u + _each(step, u) * direction, residual - _each(step, b) * moved
        slope = transposed(residual) - damping * u
        before, size = size, _dot(slope, slope)
        size = torch.where(size > least, size, 0)
        direction = slope + _each(_ratio(size, before), u) * direction
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0, of a sample that is done."""
    return torch.where(b > 0, a / b, 0)


def _each(factors: Tensor, x: Tensor) -> Tensor:
    """A factor [N] for each sample, to multiply x [N, ...] by."""
    return factors.reshape(-1, *[1] * (x.ndim - 1))
