"""Data whose exact network is known: what samplers, programs and losses are held against."""

import json
import math
from pathlib import Path

import numpy as np

from diffkern.prediction import target
from diffkern.process import EDM, VE, VP, Grid, Point, RectifiedFlow, SubVP
from diffkern.program import Program
from diffkern.schedule import Schedule

MOMENTS = json.loads((Path(__file__).parent / "data" / "moments.json").read_text())
"""Mean and standard deviation of what each sampler draws in N steps of the exact network of :class:`Affine`'s data, by
an independent implementation in float64 (18 of them again in 40 digits)."""

GRIDS = {
    "linear": lambda N: Schedule.linear().grid(N),
    "vp lambda": lambda N: VP().grid(N, "lambda", denoise=False),
    "vp uniform": lambda N: VP().grid(N, "uniform", denoise=False),
    "sub-vp uniform": lambda N: SubVP().grid(N, "uniform", denoise=False),
    "edm": lambda N: EDM().grid(N),
    "flow": lambda N: RectifiedFlow().grid(N),
    "ve": lambda N: VE().grid(N, denoise=False),
    "ve levels": lambda N: VE().grid(N),
}


class Affine:
    """One-dimensional data N(mean, variance), on affine forms: arrays of the coefficients of 1, x_T and each noise.

    The moments of what a sampler draws are exact, without a Monte Carlo run.
    """

    def __init__(self, mean: float = 0.3, variance: float = 0.25, size: int = 2000):
        self.mean, self.variance, self.size, self.seen = mean, variance, size, {}

    def denoise(self, x: np.ndarray, s: Point) -> np.ndarray:
        if s.sigma == 0:
            return x / s.alpha
        k = s.alpha * self.variance / (s.alpha**2 * self.variance + s.sigma**2)
        y = k * x
        y[0] += self.mean - k * s.alpha * self.mean
        return y

    def x_T(self) -> np.ndarray:
        return np.eye(1, self.size, 1)[0]

    def normal(self, address: int) -> np.ndarray:
        return np.eye(1, self.size, 2 + self.seen.setdefault(address, len(self.seen)))[0]

    def noise(self, address: int, count: int) -> np.ndarray:
        return sum(self.normal(address - i) for i in range(count)) / math.sqrt(count)

    def moments(self, x: np.ndarray, prior_std: float) -> tuple[float, float]:
        return float(x[0]), math.sqrt((x[1] * prior_std) ** 2 + float(np.sum(x[2:] ** 2)))


class Normal:
    """Data N(mean, covariance) in a few dimensions; the ODE of its exact network is solved in closed form."""

    def __init__(self, mean: np.ndarray, covariance: np.ndarray):
        self.mean, (self.variances, self.axes) = mean, np.linalg.eigh(covariance)

    def denoise(self, x: np.ndarray, s: Point) -> np.ndarray:
        if s.sigma == 0:
            return x / s.alpha
        gain = s.alpha * self.variances / (s.alpha**2 * self.variances + s.sigma**2)
        return self.mean + ((x - s.alpha * self.mean) @ self.axes * gain) @ self.axes.T

    def flow(self, x: np.ndarray, s: Point, t: Point) -> np.ndarray:
        """The probability-flow ODE from s to t."""
        before, after = (p.alpha**2 * self.variances + p.sigma**2 for p in (s, t))
        y = (x - s.alpha * self.mean) @ self.axes * np.sqrt(after / before)
        return t.alpha * self.mean + y @ self.axes.T


def network_output(prediction: str, x: np.ndarray, x0: np.ndarray, s: Point, grid: Grid) -> np.ndarray:
    """The output of a network whose x0_hat is ``x0``."""
    y_x, y_e = map(float, target(prediction, s.alpha, s.sigma, **grid.process.head_constants(prediction, s)))
    return y_x * x0 + y_e * (x - s.alpha * x0) / s.sigma


def interpret(program: Program, data: Affine, x: np.ndarray) -> np.ndarray:
    """A program row by row, as the kernel does it, in float64."""
    slots = [None] * program.slots
    for row in program.rows:
        out = x0 = 0 * x
        if row.point is not None:
            s = row.point
            out = x if s.sigma == 0 else network_output(program.prediction, x, data.denoise(x, s), s, program.grid)
            x0 = row.p_x * x + row.p_o * out
        after = row.k_x * x + row.k_o * out + row.k_0 * x0
        for slot, k in row.slots.items():
            after = after + k * slots[slot]
        if row.noise is not None:
            after = after + row.sigma * sum(data.normal(row.noise.address - i) for i in range(row.noise.count))
        if row.keep is not None:
            q_x, q_o, q_0 = row.q
            slots[row.keep] = q_x * x + q_o * out + q_0 * x0
        x = after
    return x
