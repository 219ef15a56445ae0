"""The variational bound, term by term."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .. import covariance, ops
from ..constraints import Quantile, limit_of
from ..model import Model
from ..process import checked_int
from ..samplers import LEARNED
from ..samplers.options import variances
from ..schedule import Schedule
from .draws import STRATA, Predict, Terms, bits, uniform


@dataclass(frozen=True, eq=False)
class Bound:
    """L_T, the divergences L_t of a time step in each of ``parts``, and L_0.

    table     a row of ``ops.diffusion_loss`` for each time step
    term_of   (out, x_0, seeds, t, table, clip) -> [B], a term of the bound
    channels  of the network's output
    clip      clamp x0_hat to [-1, 1]
    """

    schedule: Schedule
    table: Tensor
    term_of: Callable[..., Tensor]
    channels: int
    clip: bool
    parts: int

    unit = "call"

    @classmethod
    def of(cls, model: Model, levels: int | None, steps: Any, variance: Any, clip: Any) -> "Bound":
        schedule = model.schedule
        if not isinstance(schedule, Schedule):
            raise ValueError(f"method: expected 'ode' for a process without time steps, {schedule}, got 'bound'")
        if levels not in (256, None):
            raise ValueError(f"levels: expected 256 or None with method 'bound', got {levels}")
        divergences = schedule.T - 1
        expected = f"an int in 1..{divergences} or None"
        if steps is not None and not 1 <= checked_int("steps", steps, expected) <= divergences:
            raise ValueError(f"steps: expected {expected}, got {steps}")
        if variance is None:
            variance = model.default_variance
        name = variance if isinstance(variance, str) else None
        if name == "full" and levels is not None:
            raise ValueError(f"levels: expected None with variance 'full', got {levels}")
        if not isinstance(variance, str):
            variance = variances(variance, schedule.T)
            if min(variance) == 0:
                raise ValueError("variance: expected variances > 0, got 0.0")
        if clip is None:
            clip = levels is not None and (model.clip is None or model.clip)
        if isinstance(clip, Quantile) or (limit := limit_of(clip)) not in (1, None):
            raise ValueError(f"clip: expected True or False with method 'bound', got {clip!r}")
        first = "density" if levels is None else "bins"
        from ..training.objectives import Objective  # which brings the trainer, and pillow

        table = Objective(model.prediction).table(schedule, variance=variance, first=first)
        learned, channels = name in LEARNED, model.shape[0]
        term_of = covariance.bound if name == "full" else partial(_independent, learned_variance=learned)
        if learned:
            channels = covariance.channels(model.shape) if name == "full" else 2 * channels
        parts = divergences if steps is None else steps
        return cls(schedule, table, term_of, channels, limit is not None, parts)

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
        q_table, table = self.schedule.q_table(x_0.device), self.table.to(x_0.device)

        def term(t: Tensor) -> Tensor:
            out = predict(ops.q_sample(x_0, t, seeds, q_table), t).to(x_0.dtype)
            tick()
            return self.term_of(out, x_0, seeds, t, table, clip=self.clip).double()

        data = term(torch.zeros_like(seeds))
        found = torch.zeros(len(x_0), self.schedule.T, dtype=torch.float64, device=x_0.device)
        for j, (low, size) in enumerate(self.strata):
            t = torch.full_like(seeds, low)
            if size > 1:
                t += (uniform(seeds, (), STRATA + j) * size).long()
            found.scatter_(1, t[:, None], size * term(t)[:, None])
        return self.prior(x_0.double()), found, data, self.ticks

    def prior(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)), (alpha^2 (x_0^2 - 1) - ln(1 - alpha^2)) / 2 nats for each dimension."""
        alpha_bar = self.schedule.alpha_bar[-1].item()
        return bits((alpha_bar * (x_0.square() - 1) - math.log(self.schedule.one_minus_alpha_bar[-1].item())) / 2)


def _independent(*arguments: Tensor, **options: bool) -> Tensor:
    """A term of dimensions that the model draws independently of one another."""
    return ops.diffusion_loss(*arguments, bound=True, **options)[:, 1]
