"""The noise schedule: betas, and the float64 tables that follow from them.

Everything is built from ``log alpha`` by log1p, expm1 and one running sum, so that ``1 - alpha_bar`` keeps its
relative accuracy at the first steps and ``alpha_bar`` at the last ones. Tables are cast to float32 last, by whoever
hands them to a kernel. Arrays are 0-based: index t is the paper's step t + 1, and ``alpha_bar_prev[0] = 1``.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .process import END, PROCESSES, Grid, Point, Process, checked_count, checked_float, checked_int
from .process import SPACINGS as PROCESS_SPACINGS


@dataclass(frozen=True, eq=False, repr=False)
class Schedule(Process):
    """The variances ``betas`` of a forward process q(x_t|x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

    betas: T numbers in (0, 1), as a sequence, an array or a tensor; the last may be 1 (a terminal SNR of zero,
    Lin et al. 2024). Every table is a 1-d float64 tensor [T] on the CPU. Raises TypeError or ValueError.
    """

    betas: Tensor
    _log_alphas: Tensor | None = None  # where beta is near 1, log1p(-beta) would not give it back
    _config: Mapping[str, Any] | None = None

    discrete: ClassVar[bool] = True
    own: ClassVar[bool] = False
    spacing: ClassVar[str] = "trailing"

    def __post_init__(self) -> None:
        betas = _table(self.betas)
        log_alphas = _checked(betas).neg().log1p() if self._log_alphas is None else self._log_alphas
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "_log_alphas", log_alphas)

    # --- the schedules of the papers ---

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "Schedule":
        """beta from beta_start to beta_end in equal steps (Ho et al. 2020, section 4)."""
        T, beta_start, beta_end = checked_count("T", T), *_ends(beta_start, beta_end)
        betas = _equal_steps(beta_start, beta_end, T)
        return cls(betas, _config=dict(kind="linear", T=T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> "Schedule":
        """sqrt(beta) from sqrt(beta_start) to sqrt(beta_end) in equal steps (Rombach et al. 2022)."""
        T, beta_start, beta_end = checked_count("T", T), *_ends(beta_start, beta_end)
        betas = _equal_steps(math.sqrt(beta_start), math.sqrt(beta_end), T).square()
        return cls(betas, _config=dict(kind="scaled_linear", T=T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "Schedule":
        """beta from beta_start to beta_end along a sigmoid on [-6, 6] (Xu et al. 2022, GeoDiff)."""
        T, beta_start, beta_end = checked_count("T", T), *_ends(beta_start, beta_end)
        betas = _equal_steps(-6, 6, T).sigmoid() * (beta_end - beta_start) + beta_start
        return cls(betas, _config=dict(kind="sigmoid", T=T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> "Schedule":
        """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2) (Nichol & Dhariwal 2021, eq. 17)."""
        T, s = checked_count("T", T), checked_float("s", s, "a number >= 0", lambda value: value >= 0)
        max_beta = checked_float("max_beta", max_beta, "a number in (0, 1)", lambda value: 0 < value < 1)
        # f(t) = sin^2 u_t with u_t = (T - t) / T / (1 + s) pi/2, and sin^2 a - sin^2 b = sin(a - b) sin(a + b):
        # beta_t = 1 - f(t) / f(t-1) without a cancellation.
        u = torch.arange(T, -1, -1, dtype=torch.float64, device="cpu") * (math.pi / 2 / (1 + s) / T)
        betas = (u[:-1] - u[1:]).sin() * (u[:-1] + u[1:]).sin() / u[:-1].sin().square()
        return cls(betas.clamp(max=max_beta), _config=dict(kind="cosine", T=T, s=s, max_beta=max_beta))

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Sequence[float] | Tensor) -> "Schedule":
        """The schedule with this alpha_bar: T numbers below 1 that fall; the last may be 0."""
        alpha_bar = _table(alpha_bar, "alpha_bar")
        ratios = alpha_bar / torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
        falls = (ratios > 0) & (ratios < 1)
        falls[-1] |= ratios[-1] == 0
        if not falls.all():
            t = int((~falls).nonzero()[0])
            expected = "numbers that fall from below 1, the last at least 0"
            raise ValueError(f"alpha_bar: expected {expected}, got {alpha_bar[t].item()} at index {t}")
        return cls(1 - ratios, ratios.log(), dict(kind="alpha_bar", alpha_bar=alpha_bar.tolist()))

    def rescaled(self) -> "Schedule":
        """The same schedule with a terminal SNR of zero: sqrt(alpha_bar) is shifted to end at 0 and scaled to begin
        where it did (Lin et al. 2024, algorithm 1)."""
        root = self.alpha_bar.sqrt()
        if self.T == 1:
            raise ValueError("T: expected at least 2 steps to rescale, got 1")
        return Schedule.from_alpha_bar(((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square())

    # --- tables ---

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.betas)

    @cached_property
    def alphas(self) -> Tensor:
        """alpha_t = 1 - beta_t."""
        return self._log_alphas.exp()

    @cached_property
    def alpha_bar(self) -> Tensor:
        """alpha_bar_t = prod_{s <= t} alpha_s."""
        return self._log_alphas.cumsum(0).exp()

    @cached_property
    def one_minus_alpha_bar(self) -> Tensor:
        """1 - alpha_bar_t, relatively exact where alpha_bar is near 1."""
        return -self._log_alphas.cumsum(0).expm1()

    @cached_property
    def alpha_bar_prev(self) -> Tensor:
        """alpha_bar_{t-1}, 1 at index 0."""
        return torch.cat((self.alpha_bar.new_ones(1), self.alpha_bar[:-1]))

    @cached_property
    def one_minus_alpha_bar_prev(self) -> Tensor:
        """1 - alpha_bar_{t-1}, 0 at index 0."""
        return torch.cat((self.alpha_bar.new_zeros(1), self.one_minus_alpha_bar[:-1]))

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta_tilde_t, the variance of q(x_{t-1}|x_t, x_0) (Ho et al. 2020, eq. 7): 0 at index 0."""
        return self.betas * self.one_minus_alpha_bar_prev / self.one_minus_alpha_bar

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """log beta_tilde_t; index 0, where that is -inf, holds index 1's (log beta_0 where T = 1)."""
        first = self.posterior_variance[1:2] if self.T > 1 else self.betas
        return torch.cat((first, self.posterior_variance[1:])).log()

    @cached_property
    def posterior_x0(self) -> Tensor:
        """c1, the weight of x_0 in the mean of q(x_{t-1}|x_t, x_0) (Ho et al. 2020, eq. 7)."""
        return self.alpha_bar_prev.sqrt() * self.betas / self.one_minus_alpha_bar

    @cached_property
    def posterior_xt(self) -> Tensor:
        """c2, the weight of x_t in the mean of q(x_{t-1}|x_t, x_0) (Ho et al. 2020, eq. 7)."""
        return self.alphas.sqrt() * self.one_minus_alpha_bar_prev / self.one_minus_alpha_bar

    def q_table(self, device: torch.device | str | None = None) -> Tensor:
        """(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)) as float32 [T, 2]: what ``ops.q_sample`` reads."""
        return torch.stack((self.alpha_bar, self.one_minus_alpha_bar), 1).sqrt().to(device, torch.float32)

    # --- as a process of a real time: ln alpha and ln sigma are linear between the time steps ---

    @property
    def t_max(self) -> float:
        return self.T - 1.0

    @cached_property
    def _logs(self) -> tuple[np.ndarray, np.ndarray]:
        """ln alpha and ln sigma of the time steps."""
        log_alpha_bar = self._log_alphas.cumsum(0).numpy()
        return log_alpha_bar / 2, np.log(-np.expm1(log_alpha_bar)) / 2

    def log_alpha(self, t):
        return np.interp(t, np.arange(self.T), self._logs[0])

    def log_sigma(self, t):
        return np.interp(t, np.arange(self.T), self._logs[1])

    def alpha(self, t):
        return np.exp(self.log_alpha(t))

    def sigma(self, t):
        return np.exp(self.log_sigma(t))

    def derivatives(self, t):
        """The slopes of the line that leads to t from below; those of alpha itself where it falls to 0."""
        low = min(max(math.ceil(t) - 1, 0), self.T - 2)
        if self._logs[0][low + 1] == -math.inf:
            alpha, sigma = (np.exp(logs[low : low + 2]) for logs in self._logs)
            return float(alpha[1] - alpha[0]), float(sigma[1] - sigma[0])
        slopes = (logs[low + 1] - logs[low] for logs in self._logs)
        return tuple(float(value * slope) for value, slope in zip((self.alpha(t), self.sigma(t)), slopes, strict=True))

    def start_std(self, start):
        return 1.0

    def head_constants(self, prediction, point):
        if prediction != "mu":
            return super().head_constants(prediction, point)
        t = int(point.time)
        if t != point.time:
            raise ValueError(f"prediction: expected another one at the real time {point.time:.6g}, got 'mu'")
        return {"posterior": (self.posterior_x0[t].item(), self.posterior_xt[t].item())}

    def point(self, t, address=None):
        """The point at time t. A time step has the values of the tables."""
        if t != int(t):
            return super().point(t, int(t) if address is None else address)
        t = int(t)
        alpha, sigma = (math.sqrt(table[t].item()) for table in (self.alpha_bar, self.one_minus_alpha_bar))
        log_alpha, log_sigma = (float(logs[t]) for logs in self._logs)
        return Point(alpha, sigma, log_alpha, log_sigma, float(t), float(t), t)

    def removed(self, s, t):
        """From beta between two time steps, which keeps the digits of a short step: beta / (1 - alpha_bar)."""
        steps = [-1.0 if point is END else point.time for point in (t, s)]
        if any(step != int(step) for step in steps):
            return super().removed(s, t)
        first, last = (int(step) + 1 for step in steps)
        return -math.expm1(float(np.add.reduce(self._log_alphas[first:last].numpy()))) / s.sigma**2

    def between(self, s, t, fraction):
        """The time step next to that fraction of the way in lambda; None where there is none between s and t."""
        steps = np.arange(math.floor(t.time) + 1, math.ceil(s.time)) if t.sigma > 0 and s.alpha > 0 else []
        if not len(steps):
            return None
        lam = s.lam + fraction * (t.lam - s.lam)
        return self.point(int(steps[np.argmin(np.abs(self._logs[0][steps] - self._logs[1][steps] - lam))]))

    def grid(self, steps=None, spacing=None, *, denoise=True, path=False):
        """Lay out the points of a run: the time steps of :meth:`timesteps`, and the end."""
        points = [self.point(t) for t in self.timesteps(steps, spacing or self.spacing)]
        return Grid((*points, END) if denoise else tuple(points), self, path)

    # --- fewer steps ---

    def timesteps(self, steps: int | Sequence[int] | Tensor | None = None, spacing: str = "trailing") -> list[int]:
        """The steps that a sampler visits: indices into 0..T-1, strictly decreasing.

        steps: how many (None: all T), placed by ``spacing``; or the steps themselves, which are then only checked.
        spacing: "leading", "trailing" or "linspace" (named by Lin et al. 2024, table 2), or "quadratic" (Song et al.
        2021, appendix D.2, without its repeated steps), by integer arithmetic; one step alone is T-1, 0 with leading.
        "lambda" and "karras" are the steps next to those of :meth:`Process.grid`, repeats dropped.
        """
        if spacing not in SPACINGS:
            raise ValueError(f"spacing: expected one of {SPACINGS}, got {spacing!r}")
        if steps is None:
            steps = self.T
        if isinstance(steps, Tensor):
            steps = steps.tolist()
        if isinstance(steps, Iterable) and not isinstance(steps, str):
            return self._explicit(steps)
        N = checked_int("steps", steps, f"an int in 1..{self.T} or a decreasing sequence of ints")
        if not 1 <= N <= self.T:
            raise ValueError(f"steps: expected 1 to {self.T}, the length of the schedule, got {N}")
        if spacing in _STEPS:
            return _STEPS[spacing](self.T, N)
        lam = self._logs[0] - self._logs[1]
        wanted = (self.lam(t) for t in PROCESS_SPACINGS[spacing](self, N).tolist())
        return sorted({int(np.argmin(np.abs(lam - value))) for value in wanted}, reverse=True)

    def _explicit(self, steps: Iterable[int]) -> list[int]:
        steps = [checked_int("steps", t, "ints") for t in steps]
        if not steps:
            raise ValueError("steps: expected at least one step, got none")
        if not all(a > b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"steps: expected strictly decreasing steps, got {steps}")
        if steps[0] >= self.T or steps[-1] < 0:
            raise ValueError(f"steps: expected steps in 0..{self.T - 1}, got {steps[0]} to {steps[-1]}")
        return steps

    def respace(self, timesteps: int | Sequence[int] | Tensor, spacing: str = "trailing") -> "Schedule":
        """The process that visits only ``timesteps`` (as :meth:`timesteps` takes them): index i is the (i+1)-th
        smallest of them, with its alpha_bar here; the step before it is the next one listed, or x_0
        (Nichol & Dhariwal 2021, section 4)."""
        timesteps = self.timesteps(timesteps, spacing)
        starts = [0, *(t + 1 for t in timesteps[:0:-1])]
        log_alphas = torch.from_numpy(np.add.reduceat(self._log_alphas[: timesteps[0] + 1].numpy(), starts))
        config = dict(kind="respaced", schedule=self.config(), timesteps=timesteps)
        return Schedule(-log_alphas.expm1(), log_alphas, config)

    # --- in and out ---

    def config(self) -> dict[str, Any]:
        """Return the arguments from which :meth:`from_config` rebuilds this very schedule, fit for JSON."""
        return dict(self._config or dict(kind="custom", betas=self.betas.tolist()))

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "Schedule":
        """The schedule that gave ``config``. Raises TypeError or ValueError where that is none."""
        return _made(config, _KINDS)

    def __len__(self) -> int:
        return self.T

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return torch.equal(self.betas, other.betas) and torch.equal(self._log_alphas, other._log_alphas)

    __hash__ = None

    def __repr__(self) -> str:
        if self._config is None:
            return f"Schedule(<{self.T} betas>)"
        if self._config["kind"] == "respaced":
            return f"{Schedule.from_config(self._config['schedule'])!r}.respace({self._config['timesteps']})"
        arguments = ", ".join(f"{k}={v!r}" for k, v in self._config.items() if k != "kind")
        return f"Schedule.{self._config['kind']}({arguments})"


def _equal_steps(start: float, end: float, T: int) -> Tensor:
    return torch.linspace(start, end, T, dtype=torch.float64, device="cpu")


_KINDS: dict[str, Callable[..., Schedule]] = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "sigmoid": Schedule.sigmoid,
    "cosine": Schedule.cosine,
    "custom": lambda betas: Schedule(betas),
    "alpha_bar": Schedule.from_alpha_bar,
    "respaced": lambda schedule, timesteps: Schedule.from_config(schedule).respace(timesteps),
}

KINDS: dict[str, Callable[..., Process]] = _KINDS | PROCESSES
"""The function that makes a process of each kind from its ``config()``."""


def from_config(config: Mapping[str, Any]) -> Process:
    """The process that gave ``config``, a schedule or another. Raises TypeError or ValueError where that is none."""
    return _made(config, KINDS)


def _made(config: Any, kinds: Mapping[str, Callable[..., Any]]) -> Any:
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a dict, got {type(config).__name__}")
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"config: expected a kind among {sorted(kinds)}, got {kind!r}")
    known = inspect.signature(kinds[kind]).parameters
    for name in arguments:
        if name not in known:
            raise TypeError(f"config: expected arguments of {kind!r}, {', '.join(known) or 'none'}, got {name!r}")
    return kinds[kind](**arguments)


# --- spacings: N of the steps 0..T-1, strictly decreasing ---


def _trailing(T: int, N: int) -> list[int]:
    return [(2 * T * (N - i) + N) // (2 * N) - 1 for i in range(N)]  # round(T (N - i) / N) - 1


def _leading(T: int, N: int) -> list[int]:
    return [i * (T // N) for i in reversed(range(N))]


def _linspace(T: int, N: int) -> list[int]:
    M = max(N - 1, 1)
    return [T - 1 - (2 * i * (T - 1) + M) // (2 * M) for i in range(N)]  # T - 1 - round(i (T - 1) / (N - 1))


def _quadratic(T: int, N: int) -> list[int]:
    if N == 1:
        return [T - 1]
    M = (N - 1) ** 2
    return [max(i, (2 * i * i * (T - 1) + M) // (2 * M)) for i in reversed(range(N))]


_STEPS = {"leading": _leading, "linspace": _linspace, "quadratic": _quadratic, "trailing": _trailing}
SPACINGS = sorted({*_STEPS, *PROCESS_SPACINGS})
"""The ways to spread steps over a schedule."""


# --- checks ---


def _table(values: Any, name: str = "betas") -> Tensor:
    try:
        table = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__} ({error})") from None
    if table.ndim != 1 or not len(table):
        raise ValueError(f"{name}: expected a 1-d sequence of at least one number, got shape {tuple(table.shape)}")
    return table


def _checked(betas: Tensor) -> Tensor:
    good = (betas > 0) & (betas < 1)
    good[-1] |= betas[-1] == 1
    if not good.all():
        t = int((~good).nonzero()[0])
        raise ValueError(f"betas: expected numbers in (0, 1), the last at most 1, got {betas[t].item()} at index {t}")
    return betas


def _ends(beta_start: Any, beta_end: Any) -> tuple[float, float]:
    beta_start = checked_float("beta_start", beta_start, "a number in (0, 1)", lambda value: 0 < value < 1)
    expected = f"a number in [beta_start, 1) = [{beta_start}, 1)"
    return beta_start, checked_float("beta_end", beta_end, expected, lambda value: beta_start <= value < 1)
