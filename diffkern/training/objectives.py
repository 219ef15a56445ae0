"""Objectives: a prediction, how much its error counts at each level of noise, and the variational bound.

An objective fills the rows of :func:`diffkern.ops.diffusion_loss`::

    objective = min_snr(5, prediction="v")
    table = objective.table(schedule)
    x_t = ops.q_sample(x_0, t, seeds, schedule.q_table())
    loss = objective.loss(network(x_t, t), x_0, seeds, t, table).mean()

In continuous time a batch has a table of its own, ``objective.rows(levels_at(process, t))`` with a row for each
example, ``step=torch.arange(N)`` and ``address=0``. A loop of one's own draws t by ``objective.t``, and says how many
terms a bound has: ``objective.loss(..., table, terms=schedule.T)``. :mod:`diffkern.training.noising` does all of this.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .. import ops
from ..prediction import head, target
from ..process import Process, checked_int
from ..samplers import SPREAD, UNBOUNDED, VARIANCES
from ..schedule import Schedule
from .times import LogNormal, Times, Uniform

# --- levels of noise ---------------------------------------------------------------------------------------------

FIRST = {"bins": 1.0, "density": 2.0}
"""The term of the step to the image: the mass of one of 256 bins in [-1, 1], or the density."""


@dataclass(frozen=True)
class Levels:
    """Levels of noise, x_t = alpha x_0 + sigma eps, and the step that leaves each; float64 arrays [rows].

    c1, c2       the mean of q(x_prev | x_t, x_0) is c1 x_0 + c2 x_t (Ho et al. 2020, eq. 7); 0 without steps
    log_var_q    ln of its variance
    log_var_min  ln of the variance of p(x_prev | x_t): between this one
    log_var_max  and this one if it is learned, else this one
    first        of the step that ends at the image, a value of :data:`FIRST`; else 0
    g2           g^2 of the process's SDE (Song et al. 2021b); None at time steps
    sigma_data   the standard deviation of the data
    """

    alpha: NDArray
    sigma: NDArray
    c1: NDArray
    c2: NDArray
    log_var_q: NDArray
    log_var_min: NDArray
    log_var_max: NDArray
    first: NDArray
    g2: NDArray | None = None
    sigma_data: float = 0.5

    @property
    def snr(self) -> NDArray:
        return (self.alpha / self.sigma) ** 2

    def check_steps(self, what: str) -> None:
        """Raise ValueError if no step leaves these levels, which ``what`` needs."""
        if not (self.c1 > 0).all():
            raise ValueError(f"previous: expected the (alpha, sigma) that each step reaches, for {what}, got None")


def levels(
    alpha: ArrayLike,
    sigma: ArrayLike,
    previous: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    variance: str | ArrayLike = "fixed_small",
    first: str = "bins",
) -> Levels:
    """Make levels of alpha and sigma > 0, each [rows].

    previous  (alpha, sigma) that each step reaches, less noisy, sigma 0 at the image; None: there is no bound
    variance  of p: "fixed_small" is that of q(x_prev | x_t, x_0), "fixed_large" that of q(x_t | x_prev), "learned" lies
              between them, "diagonal" and "full" anywhere; or variances [rows]
    first     "bins" or "density": of the step that ends at the image

    The small variance of the step to the image is 0. The one of the step that reaches its level takes its place, or the
    large one where there is none.
    """
    alpha, sigma = np.asarray(alpha, float), np.asarray(sigma, float)
    if not (sigma > 0).all():
        raise ValueError(f"sigma: expected numbers > 0, got {sigma[~(sigma > 0)][0]}")
    if first not in FIRST:
        raise ValueError(f"first: expected one of {tuple(FIRST)}, got {first!r}")
    if previous is None:
        return Levels(alpha, sigma, *(0 * alpha for _ in range(6)))
    alpha_prev, sigma_prev = (np.broadcast_to(np.asarray(value, float), alpha.shape) for value in previous)
    ends = sigma_prev == 0
    with np.errstate(divide="ignore"):
        h = (np.log(alpha_prev) - np.log(sigma_prev)) - (np.log(alpha) - np.log(sigma))
        share = -np.expm1(-2 * h)
        small = np.log(sigma_prev**2 * share)
    large = np.log(sigma**2 * share)
    for row in np.flatnonzero(ends):
        reaching = (alpha_prev == alpha[row]) & (sigma_prev == sigma[row])
        small[row] = small[reaching][0] if reaching.any() else large[row]
    if isinstance(variance, str):
        if variance not in VARIANCES:
            raise ValueError(f"variance: expected one of {VARIANCES} or variances, got {variance!r}")
        log_var_max = small if variance == "fixed_small" else large
        log_var_min = large - SPREAD if variance in UNBOUNDED else small
    else:
        log_var_max = np.log(np.broadcast_to(np.asarray(variance, float), alpha.shape))
        log_var_min = small
    c2 = alpha / alpha_prev * (sigma_prev / sigma) ** 2
    ends_at = np.where(ends, FIRST[first], 0.0)
    return Levels(alpha, sigma, alpha_prev * share, c2, small, log_var_min, log_var_max, ends_at)


def levels_of(schedule: Schedule, **options: Any) -> Levels:
    """Make the T levels of a schedule, with the options of :func:`levels`."""
    alpha_bars = schedule.alpha_bar, schedule.one_minus_alpha_bar
    previous = schedule.alpha_bar_prev, schedule.one_minus_alpha_bar_prev
    alpha, sigma, *previous = (column.sqrt().numpy() for column in (*alpha_bars, *previous))
    return levels(alpha, sigma, tuple(previous), **options)


def levels_at(process: Process, t: ArrayLike) -> Levels:
    """Make the levels of a process at real times t [rows]; no step leaves them."""
    t = np.asarray(t, float)
    _, g2 = process.drift_and_diffusion(t)
    return replace(levels(process.alpha(t), process.sigma(t)), g2=g2, sigma_data=process.sigma_data)


# --- weights -----------------------------------------------------------------------------------------------------

Weight = Callable[[Levels], NDArray]
"""The weight of (x_0 - x0_hat)^2 at each level, the same loss whatever the network predicts."""


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) (Hang et al. 2023): min(SNR, gamma) / SNR of eps, min(SNR, gamma) / (SNR + 1) of v."""

    gamma: float = 5.0

    def __call__(self, at: Levels) -> NDArray:
        return np.minimum(at.snr, self.gamma)


@dataclass(frozen=True)
class P2:
    """SNR / (k + SNR)^gamma (Choi et al. 2022): 1 / (k + SNR)^gamma of eps."""

    k: float = 1.0
    gamma: float = 1.0

    def __call__(self, at: Levels) -> NDArray:
        return at.snr / (self.k + at.snr) ** self.gamma


@dataclass(frozen=True)
class ErrorOf:
    """1 / p_o^2 of a prediction: 1 of its own error, whatever the network predicts (Salimans & Ho 2022, section 4).

    "eps" is SNR, "v" is SNR + 1 where alpha^2 + sigma^2 = 1, "edm" is 1 / c_out^2 (Karras et al. 2022, table 1).
    sigma_data, of "edm", is that of the process unless it is given.
    """

    prediction: str
    sigma_data: float | None = None

    def __call__(self, at: Levels) -> NDArray:
        _, p_o = head(self.prediction, at.alpha, at.sigma, sigma_data=self.sigma_data or at.sigma_data)
        return 1 / p_o**2


@dataclass(frozen=True)
class Likelihood:
    """The bound's own, in nats: c1^2 / (2 var) at time steps, beta^2 / (2 var alpha (1 - ab)) of eps (Ho et al. 2020,
    eq. 12); at real times its limit, g^2 / 2 of the score (Song et al. 2021c, theorem 1).

    var is the variance of p that the levels were made with, the large one if it is learned. Raises ValueError for
    levels of neither.
    """

    def __call__(self, at: Levels) -> NDArray:
        if at.g2 is not None:
            return at.g2 * at.snr / (2 * at.sigma**2)
        at.check_steps("the weight of the bound")
        return at.c1**2 / (2 * np.exp(at.log_var_max))


# --- objectives --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """A prediction, its weight, the bound, and how t is drawn.

    prediction  what its output is: a name of :data:`diffkern.prediction.PREDICTIONS`
    weight      of its squared error: a number, or a :data:`Weight`, which is of the x_0 that it predicts
    t           how t is drawn: of a schedule's time steps by :func:`diffkern.training.times.steps`
    vlb         what the bound counts, T times the mean of its terms in bits a dimension
    stop_mean   the bound trains the variance alone
    constants   of the prediction: ``sigma_data`` of "edm", where it is not that of the process
    """

    prediction: str = "eps"
    weight: float | Weight = 1.0
    t: Times = Uniform()
    vlb: float = 0.0
    stop_mean: bool = True
    constants: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, at: Levels, device: torch.device | str | None = None) -> Tensor:
        """The table of :func:`diffkern.ops.diffusion_loss` at these levels: float32 [rows, 12].

        Raises ValueError for levels where the prediction is not finite, and for a bound of levels without steps.
        """
        if self.vlb != 0:
            at.check_steps("the bound")
        constants = {"sigma_data": at.sigma_data, **self.constants}
        if self.prediction == "mu":
            constants["posterior"] = at.c1, at.c2
        y_x, y_e = target(self.prediction, at.alpha, at.sigma, **constants)
        p_x, p_o = head(self.prediction, at.alpha, at.sigma, **constants)
        weight = self.weight(at) * p_o**2 if callable(self.weight) else self.weight
        bound = at.c1, at.log_var_q, at.log_var_min, at.log_var_max, at.first
        columns = np.broadcast_arrays(at.alpha, at.sigma, y_x, y_e, weight, p_x, p_o, *bound)
        table = torch.from_numpy(np.stack(columns, 1)).float()
        if not table.isfinite().all():
            row = int((~table.isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"prediction: expected one with a finite row at alpha {at.alpha[row]:.3g}, sigma {at.sigma[row]:.3g}, "
                f"got {self.prediction!r}"
            )
        return table.to(device)

    def table(self, schedule: Schedule, device: torch.device | str | None = None, **options: Any) -> Tensor:
        """The rows of a schedule's T levels, with the options of :func:`levels`."""
        return self.rows(levels_of(schedule, **options), device)

    def loss(
        self,
        out: Tensor,
        x_0: Tensor,
        seeds: Tensor,
        step: int | Tensor,
        table: Tensor,
        *,
        terms: int | None = None,
        weights: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Each sample's loss, float32 [N]; its arguments and options are those of ``ops.diffusion_loss``.

        terms    how many terms the whole bound has: the T of the schedule. An objective with ``vlb`` needs it
        weights  [N], of all of it: the 1 / (T p_t) of :class:`diffkern.training.times.Importance`
        """
        bound, expected = self.vlb != 0, "an int >= 1, the terms of the bound"
        if bound and checked_int("terms", terms, expected) < 1:
            raise ValueError(f"terms: expected {expected}, got {terms}")
        loss = ops.diffusion_loss(out, x_0, seeds, step, table, bound=bound, stop_mean=self.stop_mean, **options)
        if bound:
            mse, bits = loss.unbind(1)
            loss = mse + self.vlb * terms * bits
        return loss if weights is None else loss * weights


def simple(prediction: str = "eps") -> Objective:
    """The error of the network's own output (Ho et al. 2020, eq. 14)."""
    return Objective(prediction)


def eps(prediction: str = "eps") -> Objective:
    """The error of eps, whatever the network predicts."""
    return Objective(prediction, ErrorOf("eps"))


def x0(prediction: str = "x0") -> Objective:
    """The error of x_0, whatever the network predicts."""
    return Objective(prediction, ErrorOf("x0"))


def v(prediction: str = "v") -> Objective:
    """The error of v, whatever the network predicts."""
    return Objective(prediction, ErrorOf("v"))


def min_snr(gamma: float = 5.0, prediction: str = "eps") -> Objective:
    """The error of x_0, weighted by an SNR of gamma at most (Hang et al. 2023)."""
    return Objective(prediction, MinSNR(gamma))


def p2(k: float = 1.0, gamma: float = 1.0, prediction: str = "eps") -> Objective:
    """The error of eps, weighted less where little noise hides the image (Choi et al. 2022)."""
    return Objective(prediction, P2(k, gamma))


def hybrid(prediction: str = "eps", weight: float | Weight = 1.0) -> Objective:
    """The simple loss, and a thousandth of the bound for the variance (Nichol & Dhariwal 2021, eq. 16)."""
    return Objective(prediction, weight, vlb=1e-3)


def vlb(prediction: str = "eps") -> Objective:
    """The bound alone."""
    return Objective(prediction, 0.0, vlb=1.0, stop_mean=False)


def edm(sigma_data: float | None = None, prediction: str = "edm") -> Objective:
    """The error of F, with sigma log-normal (Karras et al. 2022, table 1)."""
    constants = {} if sigma_data is None else {"sigma_data": sigma_data}
    return Objective(prediction, ErrorOf("edm", sigma_data), LogNormal(), constants=constants)


def flow(times: Times | None = None, prediction: str = "flow") -> Objective:
    """The error of the velocity (Lipman et al. 2023); ``LogitNormal()`` times are those of Esser et al. 2024."""
    return Objective(prediction, ErrorOf("flow"), times or Uniform())


def dsm(prediction: str = "score") -> Objective:
    """The error of the score, weighted by sigma^2 (Song et al. 2021b, eq. 7)."""
    return Objective(prediction, ErrorOf("eps"))


def likelihood(prediction: str = "eps") -> Objective:
    """The error of x_0 as the bound weighs it (Ho et al. 2020, eq. 12; Song et al. 2021c at real times)."""
    return Objective(prediction, Likelihood())


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    f.__name__: f for f in (simple, eps, x0, v, min_snr, p2, edm, flow, dsm, likelihood, hybrid, vlb)
}
"""The objectives of training, by name: each takes ``prediction``. "hybrid" and "vlb" need a schedule's time steps."""
