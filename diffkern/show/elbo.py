"""The gap of the variational bound, where the exact network and the entropy are known.

    E[-log2 p(x_0)] <= L_T + sum_t L_t + L_0 = entropy + gap                                  (Ho et al. 2020, eq. 5)

Data are N(0.3, 0.25). The exact reverse step is a Gaussian too: its mean is the posterior's at E[x_0 | x_t], and its
variance the posterior's + c1^2 Var(x_0 | x_t) (Bao et al. 2022, theorem 1). With it the gap is KL(q(x_T) || N(0, 1))
for any number of steps. Another variance costs more. The table has ``diffkern.nll`` beside the closed form.
"""

import math

import torch
from torch import Tensor

from ..likelihood import nll
from ..schedule import Schedule
from . import Figure, Panel
from .gaussians import Gaussians

DATA = Gaussians([[0.3]], [0.5])
STEPS = (5, 10, 20, 50)
COLUMNS = ("variance", "N", "nll, bits", "standard error", "closed form", "entropy", "gap")


def unknown(data: Gaussians, schedule: Schedule) -> Tensor:
    """Var(x_0 | x_t) of one Gaussian, float64 [T]."""
    variance = data.stds.square()
    return variance * schedule.one_minus_alpha_bar / (schedule.alpha_bar * variance + schedule.one_minus_alpha_bar)


def variances(data: Gaussians, schedule: Schedule) -> dict[str, Tensor]:
    """The variances of the reverse steps, by name: float64 [T]."""
    return {
        "fixed_small": schedule.posterior_log_variance.exp(),
        "fixed_large": schedule.betas,
        "optimal": schedule.posterior_variance + schedule.posterior_x0.square() * unknown(data, schedule),
    }


def bound(data: Gaussians, schedule: Schedule, variance: Tensor) -> float:
    """E[L_T + sum_t L_t + L_0] of one Gaussian under its exact network, in bits."""
    missed = schedule.posterior_x0.square() * unknown(data, schedule)  # E of (the posterior's mean - the model's)^2
    ratio = schedule.posterior_variance / variance
    steps = ((ratio - ratio.log() - 1 + missed / variance) / 2)[1:].sum()
    first = ((2 * math.pi * variance).log() + missed / variance)[0] / 2
    second_moment = (data.stds.square() + data.means[:, 0].square())[0]
    prior = (schedule.alpha_bar[-1] * (second_moment - 1) - schedule.one_minus_alpha_bar[-1].log()) / 2
    return ((prior + steps + first) / math.log(2)).item()


def figure(n: int = 20_000) -> Figure:
    """The mean of n samples: half at mean - std and half at mean + std, for every term is quadratic in x_0."""
    sides = torch.arange(n, dtype=torch.float32, device="cpu").remainder(2) * 2 - 1
    x = (DATA.means + DATA.stds * sides[:, None]).float()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * DATA.stds.item() ** 2)
    rows, lines = [], {}
    for name in ("fixed_small", "fixed_large", "optimal"):
        for steps in STEPS:
            schedule = Schedule.linear().respace(steps)
            variance = variances(DATA, schedule)[name]
            given = variance if name == "optimal" else name
            options = dict(levels=None, variance=given, batch_size=n, progress=False)
            bits, exact = nll(DATA.model(schedule), x, **options).bits, bound(DATA, schedule, variance)
            error = bits.std().item() / math.sqrt(n)
            rows.append((name, steps, bits.mean().item(), error, exact, entropy, exact - entropy))
        lines[name] = _column(rows[-len(STEPS) :], 1), _column(rows[-len(STEPS) :], 2)
    lines["entropy"] = lines[name][0], torch.full_like(lines[name][0], entropy)
    return Figure(COLUMNS, rows, [Panel("bound, bits a dimension", lines=lines, axes=dict(xlabel="N", xticks=STEPS))])


def _column(rows: list[tuple], index: int) -> Tensor:
    return torch.tensor([row[index] for row in rows], dtype=torch.float64, device="cpu")
