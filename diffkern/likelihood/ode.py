"""The probability-flow ODE, with the volume that it gains."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import Model
from ..prediction import target
from ..process import Point, Process, checked_float, checked_int
from .draws import Predict, Terms, bits, dequantized, offset, signs


@dataclass(frozen=True)
class Ode:
    """The probability-flow ODE of z = x / sqrt(alpha^2 + sigma^2) by the angle phi = arctan(sigma / alpha).

    With alpha = cos phi and sigma = sin phi it is the same ODE for every process, dz/dphi = cos phi eps_hat - sin phi
    x0_hat (the "v" of Salimans & Ho 2022), smooth between the time steps of a schedule and finite at either end.
    """

    process: Process
    prediction: str
    levels: int | None
    tol: float
    probes: int | None
    channels: int

    ticks = 1
    unit = "batch"

    @classmethod
    def of(cls, model: Model, levels: int | None, tol: Any, probes: Any, **unused: Any) -> "Ode":
        for name, value in unused.items():
            if value is not None:
                raise ValueError(f"{name}: expected None with method 'ode', got {value!r}")
        tol = checked_float("tol", tol, "a number in (0, 1)", lambda value: 0 < value < 1)
        if probes is not None and checked_int("probes", probes, "an int >= 1 or None") < 1:
            raise ValueError(f"probes: expected an int >= 1 or None, got {probes}")
        process = model.schedule
        if model.prediction == "mu":
            raise ValueError("prediction: expected one that does not depend on time steps with method 'ode', got 'mu'")
        for t in (process.t_min, process.t_max):
            point = process.point(t)
            if not np.isfinite(velocity(model.prediction, point, process)).all():
                there = f"alpha = {point.alpha:.3g} and sigma = {point.sigma:.3g}"
                raise ValueError(
                    f"prediction: expected one that tells x0_hat and eps at {there}, got {model.prediction!r}"
                )
        try:
            import scipy.integrate  # noqa: F401
        except ImportError:
            raise ImportError("method: expected scipy for 'ode', got none: run pip install scipy") from None
        return cls(process, model.prediction, levels, tol, probes, model.shape[0])

    @cached_property
    def ends(self) -> tuple[Point, Point]:
        """The points of the sample and of the prior."""
        return self.process.point(self.process.t_min), self.process.point(self.process.t_max)

    def at(self, phi: float) -> Point:
        """The point at that angle."""
        first, last = self.ends
        if phi <= _angle(first):  # by rounding, a stage may lie beyond an end
            return first
        if phi >= _angle(last):
            return last
        return self.process.point(self.process.time(-math.log(math.tan(phi))))

    def terms(self, predict: Predict, x: Tensor, seeds: Tensor, tick: Callable[[], Any]) -> Terms:
        """(of the prior [B], of the volume [B, 1], of the levels [B]) in bits a dimension, and the network's calls."""
        from scipy.integrate import solve_ivp

        n, size, dimensions = len(x), x.numel(), x[0].numel()

        def rates(phi: float, state: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(state[:size]).to(x.device).view(x.shape)
            return torch.cat([part.flatten() for part in self.rates(predict, z, self.at(phi), seeds)]).cpu().numpy()

        scales = [math.hypot(end.alpha, end.sigma) for end in self.ends]
        z = dequantized(x, seeds, self.levels) / scales[0]
        start, angles = torch.cat((z.flatten(), z.new_zeros(n))).cpu().numpy(), [_angle(end) for end in self.ends]
        done = solve_ivp(rates, angles, start, method="RK45", rtol=self.tol, atol=self.tol)
        if not done.success:
            raise RuntimeError(f"nll: expected an ODE that can be solved to tol={self.tol}, got: {done.message}")
        end, std = torch.from_numpy(done.y[:, -1].copy()), self.process.prior_std
        x_T, expansion = end[:size].view(x.shape) * scales[1], end[size:] / dimensions + math.log(scales[1] / scales[0])
        prior = ((x_T / std).square() + math.log(2 * math.pi)) / 2 + math.log(std)
        of_levels = torch.full_like(expansion, offset(self.levels))
        tick()
        return bits(prior), -expansion[:, None] / math.log(2), of_levels, done.nfev

    def rates(self, predict: Predict, z: Tensor, point: Point, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """dz/dphi [B, ...], and its divergence [B]: float64."""
        a, b = velocity(self.prediction, point, self.process)
        scale = math.hypot(point.alpha, point.sigma)
        c_noise = torch.full((len(z),), point.c_noise, dtype=torch.float32, device=z.device)
        with torch.inference_mode(False), torch.enable_grad():
            x = (z * scale).float().requires_grad_()
            out = predict(x * self.process.c_in(point), c_noise).float()
            if not out.requires_grad:
                raise ValueError("model: expected an output that depends on x_t by torch's operations, got a constant")
            trace = torch.zeros(len(z), dtype=torch.float64, device=z.device)
            for v, weight in self.directions(x, seeds):
                (product,) = torch.autograd.grad(out, x, v, retain_graph=True)
                trace += weight * (product.double() * v).flatten(1).sum(1)
        return a * z + b * out.detach().double(), a * z[0].numel() + b * scale * trace

    def directions(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Vectors v like x and their weights: the divergence is the sum of weight v^T J v, or its mean value is."""
        if self.probes is None:
            for axis in torch.eye(x[0].numel(), dtype=x.dtype, device=x.device):
                yield axis.view(x.shape[1:]).expand_as(x), 1.0
        for i in range(self.probes or 0):
            yield signs(seeds, x.shape[1:], i), 1 / self.probes


def velocity(prediction: str, point: Point, process: Process) -> tuple[float, float]:
    """(a, b) of dz/dphi = cos phi eps_hat - sin phi x0_hat = a z + b out; infinite where out does not tell x0_hat.

    x0_hat and eps_hat solve x = alpha x0_hat + sigma eps_hat, out = y_x x0_hat + y_e eps_hat.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        y_x, y_e = target(prediction, point.alpha, point.sigma, **process.head_constants(prediction, point))
        determinant = point.alpha * y_e - point.sigma * y_x
        a = -(point.alpha * y_x + point.sigma * y_e) / determinant
        return float(a), float(np.hypot(point.alpha, point.sigma) / determinant)


def _angle(point: Point) -> float:
    return math.atan2(point.sigma, point.alpha)
