"""The variational bound, term by term."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..constraints import Quantile, limit_of
from ..model import Model
from ..prediction import head_at
from ..samplers.ancestral import VARIANCES
from ..samplers.options import one_of, variances
from ..schedule import Schedule, checked_int
from .draws import STRATA, Predict, Terms, bits, uniform


@dataclass(frozen=True, eq=False)
class Bound:
    """L_T, the divergences L_t of a time step in each of ``parts``, and L_0.

    rows     what the terms of each time step are made of, by name, float64 [T]
    learned  the network's second half tells the variance
    limit    of x0_hat, or None
    """

    schedule: Schedule
    rows: dict[str, Tensor]
    learned: bool
    levels: int | None
    limit: float | None
    parts: int

    unit = "call"

    @classmethod
    def of(cls, model: Model, levels: int | None, steps: Any, variance: Any, clip: Any) -> "Bound":
        schedule = model.schedule
        if not isinstance(schedule, Schedule):
            raise ValueError(f"method: expected 'ode' for a process without time steps, {schedule}, got 'bound'")
        divergences = schedule.T - 1
        expected = f"an int in 1..{divergences} or None"
        if steps is not None and not 1 <= checked_int("steps", steps, expected) <= divergences:
            raise ValueError(f"steps: expected {expected}, got {steps}")
        if variance is None:
            variance = model.variance or ("learned" if model.learned_variance else "fixed_small")
        if clip is None:
            clip = levels is not None and (model.clip is None or model.clip)
        if isinstance(clip, Quantile):
            raise ValueError(f"clip: expected True, False, a number > 0 or a range (-a, a), got {clip}")
        learned = isinstance(variance, str) and variance == "learned"
        parts = divergences if steps is None else steps
        return cls(schedule, _rows_of(schedule, model.prediction, variance), learned, levels, limit_of(clip), parts)

    @property
    def ticks(self) -> int:
        return self.parts + 1

    @cached_property
    def strata(self) -> list[tuple[int, int]]:
        """(the first of the time steps 1..T-1, how many) of each part."""
        edges = [1 + j * (self.schedule.T - 1) // max(self.parts, 1) for j in range(self.parts + 1)]
        return [(low, high - low) for low, high in zip(edges[:-1], edges[1:], strict=True)]

    def terms(self, predict: Predict, x_0: Tensor, seeds: Tensor, tick: Callable[[], Any]) -> Terms:
        """(L_T [B], L_t [B, T], L_0 [B]) in bits a dimension, and how often the network was called."""
        table = self.schedule.q_table(x_0.device)
        rows = {name: column.to(x_0.device) for name, column in self.rows.items()}

        def model_step(t: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            x_t = ops.q_sample(x_0, t, seeds, table)
            row = {name: _each(column[t], x_0) for name, column in rows.items()}
            x0_hat, log_var = self.distribution(x_t.double(), predict(x_t, t).double(), row)
            tick()
            return x0_hat, log_var, row

        x0_hat, log_var, _ = model_step(torch.zeros_like(seeds))
        data = bits(sample_nats(x_0.double(), x0_hat, log_var, self.levels))
        found = torch.zeros(len(x_0), self.schedule.T, dtype=torch.float64, device=x_0.device)
        for j, (low, size) in enumerate(self.strata):
            t = torch.full_like(seeds, low)
            if size > 1:
                t += (uniform(seeds, (), STRATA + j) * size).long()
            x0_hat, log_var, row = model_step(t)
            nats = divergence_nats(row["c1"] * (x_0.double() - x0_hat), row["log_var_q"], log_var)
            found.scatter_(1, t[:, None], size * bits(nats)[:, None])
        return bits(self.prior_nats(x_0.double())), found, data, self.ticks

    def distribution(self, x_t: Tensor, out: Tensor, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x0_hat, and the logarithm of the variance of p(x_{t-1} | x_t)."""
        out, *second_half = out.chunk(2, 1) if self.learned else (out,)
        x0_hat = row["p_x"] * x_t + row["p_o"] * out
        if self.limit is not None:
            x0_hat = x0_hat.clamp(-self.limit, self.limit)
        low, high = row["log_var_min"], row["log_var_max"]
        return x0_hat, low + (second_half[0] + 1) / 2 * (high - low) if self.learned else high

    def prior_nats(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) of each dimension: (alpha^2 (x_0^2 - 1) - ln(1 - alpha^2)) / 2."""
        alpha_bar = self.schedule.alpha_bar[-1].item()
        return (alpha_bar * (x_0.square() - 1) - math.log(self.schedule.one_minus_alpha_bar[-1].item())) / 2


def _rows_of(schedule: Schedule, prediction: str, variance: Any) -> dict[str, Tensor]:
    """See :class:`Bound`: x0_hat = p_x x_t + p_o out, the posterior's weight of x_0, and logarithms of variances."""
    heads = [head_at(prediction, schedule.point(t), schedule) for t in range(schedule.T)]
    p_x, p_o = torch.tensor(heads, dtype=torch.float64, device="cpu").unbind(1)
    small, large = schedule.posterior_log_variance, schedule.betas.log()
    if isinstance(variance, str):
        one_of("variance", variance, VARIANCES, " or a tensor of variances")
        low, high = {"fixed_small": (small, small), "fixed_large": (large, large), "learned": (small, large)}[variance]
    else:
        given = torch.tensor(variances(variance, schedule.T), dtype=torch.float64, device="cpu")
        if not (given > 0).all():
            raise ValueError(f"variance: expected variances > 0, got {given.min().item()}")
        low = high = given.log()
    return dict(p_x=p_x, p_o=p_o, c1=schedule.posterior_x0, log_var_q=small, log_var_min=low, log_var_max=high)


def divergence_nats(difference: Tensor, log_var_q: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(m, e^log_var_q) || N(m - difference, e^log_var))."""
    ratio = log_var_q - log_var
    return (ratio.expm1() - ratio + difference.square() * (-log_var).exp()) / 2


def sample_nats(x: Tensor, mean: Tensor, log_var: Tensor, levels: int | None) -> Tensor:
    """-ln of N(x; mean, e^log_var), or of its probability of the level of x, float64.

    A level reaches halfway to the next ones, and the first and the last have no end. Both its ends are taken to the
    lower tail, where ln Phi keeps all digits at any distance.
    """
    if levels is None:
        return (math.log(2 * math.pi) + log_var + (x - mean).square() * (-log_var).exp()) / 2
    half, precision = 1 / (levels - 1), (log_var / -2).exp()
    low = torch.where(x < half - 1, -math.inf, (x - half - mean) * precision)
    high = torch.where(x > 1 - half, math.inf, (x + half - mean) * precision)
    low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)
    upper = torch.special.log_ndtr(high)
    less = torch.special.log_ndtr(low) - upper  # ln(Phi(low) / Phi(high))
    share = torch.where(less > -math.log(2), (-less.expm1()).log(), (-less.exp()).log1p())
    return -upper - share


def _each(column: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], as many dimensions as x has."""
    return column.view(-1, *[1] * (x.ndim - 1))
