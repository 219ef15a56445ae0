"""The swiss roll of Sohl-Dickstein et al. 2015, with a learned diagonal and with a learned full covariance.

A small MLP tells the mean and the covariance of each of 40 reverse steps, and is trained by the variational bound.

    python -m diffkern.show.swiss_roll [--steps 2000] [--out swiss_roll.png]

Prints the bound of held-out points in nats beside the entropy of the best Gaussian, and how far samples are from the
roll beside how far data are. A picture needs matplotlib.
"""

import argparse
import math

import torch
from torch import Tensor, nn

from .. import Model, Schedule, covariance, nll, ops, sample
from ..training import objectives

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


def train(variance: str, steps: int, batch_size: int = 512, seed: int = 0) -> Model:
    """A model of the roll whose variance is "diagonal" or "full", trained by the bound."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = MLP(covariance.channels((2,)) if variance == "full" else 4)
    objective = objectives.vlb()
    table, q_table = objective.table(SCHEDULE, variance=variance, first="density"), SCHEDULE.q_table()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
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
    return Model(network, SCHEDULE, "eps", (2,), name=variance, variance=variance)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the example; returns each bound in nats."""
    parser = argparse.ArgumentParser(description="Learned covariances on a swiss roll.")
    parser.add_argument("--steps", type=int, default=2000, help="of training (default: 2000)")
    parser.add_argument("--n", type=int, default=4000, help="points to measure, and to draw (default: 4000)")
    parser.add_argument("--out", help="a picture of data and samples")
    arguments = parser.parse_args(argv)
    x = swiss_roll(arguments.n, torch.Generator().manual_seed(1))
    gaussian = torch.linalg.slogdet(2 * math.pi * math.e * x.double().T.cov()).logabsdet.item() / 2
    print("| variance | bound, nats | best Gaussian | distance to the roll, median | 95 % |")
    print("| --- | ---: | ---: | ---: | ---: |")
    shown, bounds = {"data": x}, {}
    for variance in ("diagonal", "full"):
        model = train(variance, arguments.steps)
        options = dict(batch_size=arguments.n, progress=False)
        bounds[variance] = nll(model, x, levels=None, **options).bits.mean().item() * 2 * math.log(2)
        shown[variance] = sample(model, arguments.n, clip=False, **options)
        middle, far = distances(shown[variance]).quantile(torch.tensor([0.5, 0.95], **FLOAT)).tolist()
        print(f"| {variance} | {bounds[variance]:.3f} | {gaussian:.3f} | {middle:.3f} | {far:.3f} |", flush=True)
    middle, far = distances(x).quantile(torch.tensor([0.5, 0.95], **FLOAT)).tolist()
    print(f"| data | | {gaussian:.3f} | {middle:.3f} | {far:.3f} |")
    if arguments.out:
        picture(shown, arguments.out)
    return bounds


def picture(points: dict[str, Tensor], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(points), 4), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, len(points)), points.items(), strict=True):
        axes.plot(*x.T.numpy(), ".", markersize=1)
        axes.set(title=name, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    figure.savefig(path)


if __name__ == "__main__":
    main()
