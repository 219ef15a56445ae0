"""Processes: how much image and how much noise x_t holds at each time t, and the points that a sampler visits.

    x_t = alpha(t) x_0 + sigma(t) eps

A process is two functions of a real time, and what the network is told of it. Every solver is written in the few
quantities of a :class:`Point`, so that no sampler knows a process. All of this is float64 on the host.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Point:
    """The quantities of a process at one time.

    alpha, sigma          x_t = alpha x_0 + sigma eps
    log_alpha, log_sigma  their logarithms, with the digits that alpha and sigma have lost near 0 and 1
    time                  t; NaN at the end of a run, where sigma is 0
    c_noise               what the network gets as its t: a time step, 999 t, ln(sigma) / 4
    address               of the noise of a step that leaves here
    """

    alpha: float
    sigma: float
    log_alpha: float
    log_sigma: float
    time: float
    c_noise: float
    address: int = 0

    @property
    def lam(self) -> float:
        """lambda = ln(alpha / sigma), half the log-SNR (Kingma et al. 2021): infinite where sigma is 0."""
        return self.log_alpha - self.log_sigma

    @property
    def rho(self) -> float:
        """sigma / alpha, the noise of x_t / alpha: infinite where alpha is 0."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    def to(self, t: "Point") -> float:
        """h = lambda_t - lambda, the length of a step from here: infinite from alpha = 0, and to sigma = 0."""
        return math.inf if t.sigma == 0 or self.alpha == 0 else t.lam - self.lam


END = Point(1.0, 0.0, log_alpha=0.0, log_sigma=-math.inf, time=math.nan, c_noise=math.nan, address=-1)


class Process(ABC):
    """Noise by time: ``alpha``, ``sigma`` and ``c_noise`` of t in [t_min, t_max], as float64 NumPy arrays.

    A process says these three. The rest follows from them; a subclass may say it again in closed form.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    sigma_data: float = 0.5  # the standard deviation of the data, by which "edm" scales the network's output
    discrete: ClassVar[bool] = False  # whether c_noise is a whole number, which the network gets as int64
    spacing: ClassVar[str] = "uniform"  # of a grid, unless another one is asked for
    prediction: ClassVar[str] = "eps"  # of a network that is trained on it, unless another one is asked for
    objective: ClassVar[str] = "simple"  # of its training, a name of diffkern.training.objectives.OBJECTIVES

    # --- what a process says ---

    @abstractmethod
    def alpha(self, t: ArrayLike) -> NDArray:
        """The factor of the data in x_t."""

    @abstractmethod
    def sigma(self, t: ArrayLike) -> NDArray:
        """The standard deviation of the noise in x_t."""

    def c_noise(self, t: ArrayLike) -> NDArray:
        """Return c_noise, which the network gets as its t."""
        return np.asarray(t)

    def c_in(self, point: Any) -> ArrayLike:
        """The network gets c_in x_t. ``point`` has alpha and sigma, numbers or arrays."""
        return 1.0

    def head_constants(self, prediction: str, point: Point) -> dict[str, Any]:
        """The constants of :func:`diffkern.prediction.head` that this process has."""
        if prediction == "mu":
            raise ValueError("prediction: expected another one on a process without time steps, got 'mu'")
        return {"sigma_data": self.sigma_data}

    def start_std(self, start: Point) -> float:
        """The standard deviation of x where a run starts: sigma, or 1 where the process preserves the variance."""
        return start.sigma

    def config(self) -> dict[str, Any]:
        """Return the arguments from which :func:`diffkern.schedule.from_config` makes this very process, fit for JSON.

        Raises TypeError for a process of a class of one's own.
        """
        if self.own:
            names = ", ".join(maker.__name__ for maker in PROCESSES.values())
            raise TypeError(f"schedule: expected a Schedule or one of {names} to describe, got {type(self).__name__}")
        return {"kind": next(kind for kind, maker in PROCESSES.items() if type(self) is maker), **asdict(self)}

    @property
    def own(self) -> bool:
        """Whether its class is none of :data:`PROCESSES`, nor a schedule's: a file can hold its name, but no code."""
        return type(self) not in PROCESSES.values()

    @property
    def prior_std(self) -> float:
        """The standard deviation of x at t_max."""
        return self.start_std(self.point(self.t_max))

    # --- what follows ---

    def log_alpha(self, t: ArrayLike) -> NDArray:
        return np.log(self.alpha(t))

    def log_sigma(self, t: ArrayLike) -> NDArray:
        return np.log(self.sigma(t))

    def lam(self, t: float) -> float:
        """lambda = ln(alpha / sigma) at t. It falls as t grows."""
        with np.errstate(divide="ignore"):
            return float(self.log_alpha(t)) - float(self.log_sigma(t))

    def time(self, lam: float) -> float:
        """The t of a lambda, by bisection to the last bit."""
        low, high = self.t_min, self.t_max
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if self.lam(middle) > lam else (low, middle)
        return low if abs(self.lam(low) - lam) < abs(self.lam(high) - lam) else high

    def derivatives(self, t: ArrayLike) -> tuple[NDArray, NDArray]:
        """(dalpha/dt, dsigma/dt), by a complex step (Squire & Trapp 1998)."""
        step = 1e-30
        return tuple(np.asarray(np.imag(f(t + 1j * step)) / step)[()] for f in (self.alpha, self.sigma))

    def drift_and_diffusion(self, t: ArrayLike) -> tuple[NDArray, NDArray]:
        """(f, g^2) of dx = f x dt + g dw: f = dln alpha/dt, g^2 = dsigma^2/dt - 2 f sigma^2 (Song et al. 2021b)."""
        sigma, (d_alpha, d_sigma) = self.sigma(t), self.derivatives(t)
        f = d_alpha / self.alpha(t)
        return f, 2 * sigma * (d_sigma - f * sigma)

    def removed(self, s: Point, t: Point) -> float:
        """1 - e^-2h of a step from s to t: the part of the noise's variance that it takes away."""
        return -math.expm1(-2 * s.to(t))

    # --- points and grids ---

    def point(self, t: float, address: int = 0) -> Point:
        """The point at time t."""
        with np.errstate(divide="ignore"):
            values = (f(t) for f in (self.alpha, self.sigma, self.log_alpha, self.log_sigma, np.asarray, self.c_noise))
            return Point(*(float(value) for value in values), address)

    def between(self, s: Point, t: Point, fraction: float) -> Point | None:
        """The point at that fraction of the way from s to t in lambda; None where there is none."""
        if not (math.isfinite(s.lam) and math.isfinite(t.lam)):
            return None
        return self.point(self.time(s.lam + fraction * (t.lam - s.lam)), s.address)

    def at_rho(self, rho: float, address: int = 0) -> Point:
        """The point whose sigma / alpha that is."""
        return self.point(self.time(-math.log(rho)), address)

    def grid(
        self, steps: int | Sequence[float] = 20, spacing: str | None = None, *, denoise: bool = True, path: bool = False
    ) -> "Grid":
        """Lay out the points of a run, from t_max down.

        steps    how many; or the times that are left, decreasing
        spacing  "uniform" in t, "lambda", uniform in lambda, or "karras", uniform in (sigma / alpha)^(1/7) (Karras et
                 al. 2022, eq. 5); None is the process's own
        denoise  end at sigma = 0, by a step from t_min where its sigma is not 0; without, end at t_min
        path     address noise by the path: see :meth:`Grid.on_path`

        Raises TypeError or ValueError.
        """
        spacing = self.spacing if spacing is None else spacing
        if spacing not in SPACINGS:
            raise ValueError(f"spacing: expected one of {sorted(SPACINGS)}, got {spacing!r}")
        if isinstance(steps, Iterable) and not isinstance(steps, str):
            times = np.array([float(t) for t in steps])
        else:
            steps = checked_count("steps", steps)
            times = SPACINGS[spacing](self, steps if denoise and float(self.sigma(self.t_min)) > 0 else steps + 1)
        if not (len(times) and (np.diff(times) < 0).all() and self.t_min <= times[-1] and times[0] <= self.t_max):
            expected = f"times that fall within [{self.t_min}, {self.t_max}]"
            raise ValueError(f"steps: expected {expected}, got {times.tolist()}")
        points = [self.point(float(t), address) for address, t in enumerate(times)]
        if points[-1].sigma > 0 and denoise:
            points.append(END)
        grid = Grid(tuple(points), self)
        return grid.on_path() if path else grid


@dataclass(frozen=True)
class Grid:
    """The points of a run in their order; the last is where it ends, with sigma 0 as a rule."""

    points: tuple[Point, ...]
    process: Process
    path: bool = False

    # On a continuous process a path has a noise for each of so many parts of lambda in [-LIMIT, LIMIT].
    CELLS: ClassVar[int] = 1024
    LIMIT: ClassVar[float] = 7.0

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.points) - 1

    @cached_property
    def steps(self) -> tuple[tuple[Point, Point], ...]:
        """(s, t) of each step: the point that it leaves and the point that it reaches."""
        return tuple(zip(self.points[:-1], self.points[1:], strict=True))

    def reversed(self) -> "Grid":
        """The same points backwards, for encoding."""
        return replace(self, points=self.points[::-1])

    def tail(self, fraction: float) -> "Grid":
        """The last part of the run: that fraction of its steps, one at least."""
        return replace(self, points=self.points[-1 - max(1, round(fraction * len(self))) :])

    def on_path(self) -> "Grid":
        """The same points with the noise of a path: a step gets the sum of the noises of all that it passes.

        These are the time steps of a schedule, or equal parts of lambda. So the same seed gives similar images for any
        number of steps. Over all time steps it is the ordinary noise, bit for bit.
        """
        if self.process.discrete:
            return replace(self, path=True)
        cells = self.CELLS / (2 * self.LIMIT)
        address = [round((self.LIMIT - min(max(p.lam, -self.LIMIT), self.LIMIT)) * cells) for p in self.points]
        address = [max(a, 1) if p.sigma > 0 else 0 for a, p in zip(address, self.points, strict=True)]
        if any(a <= b for a, b in zip(address[:-1], address[1:], strict=True)):
            raise ValueError(
                f"noise: expected 'step' with {len(self)} steps, which are too near for a path, got 'path'"
            )
        points = (replace(p, address=a - 1) for p, a in zip(self.points, address, strict=True))
        return replace(self, points=tuple(points), path=True)


# --- spacings: times, decreasing ---


def _uniform(process: Process, count: int) -> NDArray:
    return np.linspace(process.t_max, process.t_min, count)


def _lambda(process: Process, count: int) -> NDArray:
    ends = process.lam(process.t_max), process.lam(process.t_min)
    return _times("lambda", process, np.linspace(*ends, count) if np.isfinite(ends).all() else None)


def _karras(process: Process, count: int) -> NDArray:
    ends = [
        math.exp(-process.lam(t) / 7) if process.lam(t) > -math.inf else math.inf
        for t in (process.t_max, process.t_min)
    ]
    return _times(
        "karras", process, -7 * np.log(np.linspace(*ends, count)) if min(ends) > 0 and max(ends) < math.inf else None
    )


def _times(spacing: str, process: Process, lam: NDArray | None) -> NDArray:
    if lam is None:
        raise ValueError(
            f"spacing: expected 'uniform' where alpha or sigma is 0 at an end of {process}, got {spacing!r}"
        )
    return np.array([process.t_max, *(process.time(float(value)) for value in lam[1:-1]), process.t_min][: len(lam)])


SPACINGS: dict[str, Callable[[Process, int], NDArray]] = {"uniform": _uniform, "lambda": _lambda, "karras": _karras}


# --- the processes of the papers; a schedule of betas is the discrete one (schedule.py) ---


@dataclass(frozen=True)
class VP(Process):
    """The variance-preserving SDE with beta(t) from beta_min to beta_max (Song et al. 2021b, eq. 11)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    objective: ClassVar[str] = "dsm"

    def __post_init__(self):
        _check_fields(self, ("t_min", "t_max"))
        _check_order(self, "beta_min", "beta_max", self.beta_min <= self.beta_max)

    def log_alpha(self, t):
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t):
        return np.exp(self.log_alpha(t))

    def sigma(self, t):
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def c_noise(self, t):
        return 999 * t

    def start_std(self, start):
        return 1.0


@dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP SDE, whose sigma is 1 - alpha^2 (Song et al. 2021b, eq. 12)."""

    def sigma(self, t):
        return -np.expm1(2 * self.log_alpha(t))


@dataclass(frozen=True)
class VE(Process):
    """The variance-exploding SDE, sigma from sigma_min to sigma_max geometrically (Song et al. 2021b, eq. 9)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    c_noise_scale: float = 1.0  # the network is told ln(c_noise_scale sigma): 0.5 where it counts sigma of [0, 1]
    objective: ClassVar[str] = "dsm"

    def __post_init__(self):
        _check_fields(self, ("sigma_min", "sigma_max"))

    def alpha(self, t):
        return 1 + 0 * t

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def c_noise(self, t):
        return np.log(self.c_noise_scale * self.sigma(t))


@dataclass(frozen=True)
class EDM(Process):
    """sigma(t) = t, with the scaling of Karras et al. 2022, table 1, for data of standard deviation sigma_data."""

    sigma_data: float = 0.5
    t_min: float = 0.002
    t_max: float = 80.0
    spacing: ClassVar[str] = "karras"
    prediction: ClassVar[str] = "edm"
    objective: ClassVar[str] = "edm"

    def __post_init__(self):
        _check_fields(self, ("t_min", "t_max"))

    def alpha(self, t):
        return 1 + 0 * t

    def sigma(self, t):
        return np.asarray(t)

    def time(self, lam):
        return math.exp(-lam)

    def c_noise(self, t):
        return np.log(t) / 4

    def c_in(self, point):
        return 1 / np.hypot(point.sigma, self.sigma_data)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """x_t = (1 - t) x_0 + t eps, a straight line (Lipman et al. 2023; Liu et al. 2023)."""

    c_noise_scale: float = 1.0  # 1000 where the network counts to 1000
    prediction: ClassVar[str] = "flow"
    objective: ClassVar[str] = "flow"

    def __post_init__(self):
        _check_fields(self)

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return np.asarray(t)

    def c_noise(self, t):
        return self.c_noise_scale * t


PROCESSES: dict[str, Callable[..., Process]] = {
    "vp": VP,
    "sub_vp": SubVP,
    "ve": VE,
    "edm": EDM,
    "flow": RectifiedFlow,
}
"""The processes above, by the name that a file and the command line have for them."""


# --- checks ---


def _check_fields(process: Any, *rising: tuple[str, str]) -> None:
    """Make each field a float > 0; of each pair in ``rising`` the second is larger. TypeError or ValueError."""
    for field in fields(process):
        value = checked_float(field.name, getattr(process, field.name), "a number > 0", lambda value: value > 0)
        object.__setattr__(process, field.name, value)  # past ``frozen``
    for low, high in rising:
        _check_order(process, low, high, getattr(process, low) < getattr(process, high))


def _check_order(process: Any, low: str, high: str, holds: bool) -> None:
    if not holds:
        expected = f"{low}: expected a number below {high}, {getattr(process, high)}"
        raise ValueError(f"{expected}, got {getattr(process, low)}")


def checked_int(name: str, value: Any, expected: str) -> int:
    """``value`` as an int, of whatever integer type but bool; TypeError otherwise."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None


def checked_float(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    """``value`` as a float, finite and such that ``holds(value)``; TypeError or ValueError otherwise.

    A tensor or an array of no dimensions is a number too.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def checked_count(name: str, value: Any, low: int = 1) -> int:
    """``value`` as an int of at least ``low``. Raises TypeError or ValueError."""
    value = checked_int(name, value, f"an int >= {low}")
    if value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {value}")
    return value
