"""The swiss roll of Sohl-Dickstein et al. 2015, with a learned diagonal and with a learned full covariance.

A small MLP tells the mean and the covariance of each of 40 reverse steps, and is trained by the variational bound.

    p(x_{t-1} | x_t) = N(mean, F F^T), F = diag(std) C,  C = 1 for a diagonal covariance, else lower triangular

The table has the bound of held-out points in nats beside the entropy of the best Gaussian, and how far samples are from
the roll beside how far data are.
"""

import math

import torch
from torch import Tensor, nn

from .. import covariance, ops
from ..likelihood import nll
from ..model import Model
from ..networks.defaults import float32_on
from ..progress import bar as progress_bar
from ..sampling import sample
from ..schedule import Schedule
from ..training import objectives
from . import Figure, Panel

COLUMNS = ("variance", "bound, nats", "best Gaussian", "distance to the roll, median", "95 %")
SCHEDULE = Schedule.linear(40, 1e-3, 0.3)
FLOAT, INT = (dict(dtype=dtype, device="cpu") for dtype in (torch.float32, torch.int64))


def swiss_roll(n: int, generator: torch.Generator, noise: float = 0.025) -> Tensor:
    """Points [n, 2] of about unit variance."""
    return _roll(torch.rand(n, generator=generator, **FLOAT)) + noise * torch.randn(n, 2, generator=generator, **FLOAT)


def _roll(fraction: Tensor) -> Tensor:
    """The points [n, 2] at these fractions of its length in angle."""
    angle = 1.5 * math.pi * (1 + 2 * fraction)
    return torch.stack((angle * angle.cos(), angle * angle.sin()), 1) / 7


def distances(points: Tensor) -> Tensor:
    """To the nearest of many points of the roll without noise: [n]."""
    return torch.cdist(points, _roll(torch.linspace(0, 1, 4000, **FLOAT))).amin(1)


class MLP(nn.Module):
    """(x_t [N, 2], t [N]) -> [N, channels], which is zero at first. Waves of x make it see the roll's turns."""

    def __init__(self, channels: int, width: int = 128, waves: int = 3):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(waves, **FLOAT))
        self.position, self.time = nn.Linear(2 + 4 * waves, width), nn.Embedding(SCHEDULE.T, width)
        layers = (nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.layers = nn.Sequential(*layers, nn.Linear(width, channels))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        phase = (x_t[:, :, None] * self.frequencies).flatten(1)
        position = self.position(torch.cat((x_t, phase.cos(), phase.sin()), 1))
        return self.layers(position + self.time(t))


def train(variance: str, steps: int, batch_size: int = 512, seed: int = 0, *, progress: bool = False) -> Model:
    """A model of the roll whose variance is "diagonal" or "full", trained by the bound."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.default_generator.manual_seed(seed)
        network = MLP(covariance.channels((2,)) if variance == "full" else 4)
    objective = objectives.vlb()
    table, q_table = objective.table(SCHEDULE, variance=variance, first="density"), SCHEDULE.q_table()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress_bar(steps, variance, "step", progress) as bar:
        for step in range(steps):
            x_0 = swiss_roll(batch_size, generator)
            seeds = torch.arange(step * batch_size, (step + 1) * batch_size, **INT)
            t = torch.randint(SCHEDULE.T, (batch_size,), generator=generator, **INT)
            out = network(ops.q_sample(x_0, t, seeds, q_table), t)
            if variance == "full":
                loss = SCHEDULE.T * covariance.bound(out, x_0, seeds, t, table)
            else:
                loss = objective.loss(out, x_0, seeds, t, table, terms=SCHEDULE.T, learned_variance=True)
            optimizer.zero_grad()
            loss.mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            bar.update()
    return Model(network, SCHEDULE, "eps", (2,), name=variance, variance=variance)


def figure(steps: int = 2000, n: int = 4000, progress: bool = True) -> Figure:
    """Train for ``steps`` steps; measure and draw n points."""
    x = swiss_roll(n, torch.Generator("cpu").manual_seed(1))
    gaussian = torch.linalg.slogdet(2 * math.pi * math.e * x.double().T.cov()).logabsdet.item() / 2
    shown, rows = {"data": x}, []
    for variance in ("diagonal", "full"):
        model = train(variance, steps, progress=progress)
        options = dict(batch_size=n, progress=False)
        bound = nll(model, x, levels=None, **options).bits.mean().item() * 2 * math.log(2)
        shown[variance] = sample(model, n, clip=False, **options)
        rows.append((variance, bound, gaussian, *_far(shown[variance])))
    rows.append(("data", math.nan, gaussian, *_far(x)))
    axes = dict(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    return Figure(COLUMNS, rows, [Panel(name, points={"": points}, axes=axes) for name, points in shown.items()])


def _far(points: Tensor) -> list[float]:
    """The median and the 95th percentile of their distances to the roll."""
    return distances(points).quantile(torch.tensor([0.5, 0.95], **FLOAT)).tolist()
