"""One step by a consistency function, where it is known, beside a denoiser.

    f(x_t, t) = x_0 of the probability-flow ODE through x_t = F_0^-1(F_t(x_t)) in one dimension   (Song et al. 2023)

F_t is the distribution function of x_t. Data are a mixture of two Gaussians. Both networks are exact: f, and E[x_0 |
x_t], which a denoiser is trained for. The sampler ``consistency`` draws with each. The table has the largest difference
between the distribution of the samples and that of the data (Kolmogorov & Smirnov).
"""

import torch
from torch import Tensor

from ..model import Model
from ..sampling import sample
from ..schedule import Schedule
from . import Figure, Panel
from .gaussians import Gaussians, critical

DATA = Gaussians([[-1.5], [1.0]], [0.2, 0.4], [0.4, 0.6])
STEPS = (1, 2, 4)
COLUMNS = ("network", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS), "critical")


def consistency_model(data: Gaussians, schedule: Schedule) -> Model:
    """The exact consistency function of one-dimensional data, as a model that predicts x_0."""

    def network(x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x_t)
        for time in t.unique():
            s, rows = schedule.point(time.item()), t == time
            p = data.cdf(x_t[rows, 0], s.alpha, s.sigma).clamp(1e-12, 1 - 1e-12)
            out[rows, 0] = data.quantile(p).to(x_t.dtype)
        return out

    return Model(network, schedule, "x0", (1,), name="consistency", clip=False)


def figure(n: int = 2000) -> Figure:
    """n samples of each network and number of steps."""
    schedule = Schedule.linear()
    models = {
        "consistency function": consistency_model(DATA, schedule),
        "denoiser E[x_0 given x_t]": DATA.model(schedule, "x0"),
    }
    bins = torch.linspace(-3, 3, 61, dtype=torch.float64, device="cpu")
    middles, width = (bins[1:] + bins[:-1]) / 2, bins[1] - bins[0]
    rows, panels = [], []
    for name, model in models.items():
        options = dict(sampler="consistency", batch_size=n, progress=False)
        drawn = [sample(model, n, steps=steps, **options)[:, 0].double() for steps in STEPS]
        rows.append((name, *(DATA.distance(x) for x in drawn), critical(n)))
        lines = {"data": (middles, DATA.log_prob(middles[:, None]).exp())}
        for column, x in zip(COLUMNS[1:], drawn, strict=False):
            lines[column] = middles, torch.histogram(x, bins).hist / (n * width)
        panels.append(Panel(name, lines=lines, axes=dict(xlabel="x", ylim=(0, 1.5))))
    return Figure(COLUMNS, rows, panels)
