"""A normalizing flow beside a diffusion model: exact likelihoods in the plane, and what separate modes cost a flow.

    flow       ln p(x) = ln N(f(x); 0, I) + ln |det df/dx|                                    (Dinh et al. 2017)
    diffusion  ln p(x) by the probability-flow ODE, with the exact divergence       (Song et al. 2021b, eq. 39)

Both are trained on points of three densities whose entropy is known. The table has the negative log-likelihood of other
points, and the mean of ln truth - ln model there: the Kullback-Leibler divergence from the truth.
"""

import math

import torch
from torch import Tensor, nn

from ..flows import Flow, RealNVP
from ..flows.architectures import MLP
from ..likelihood import nll
from ..model import Model
from ..networks.defaults import float32_on
from ..process import EDM
from ..training import Config, Trainer
from . import Figure, Panel
from .densities import DENSITIES, Density

COLUMNS = ("data", "model", "nll, nats", "KL to the truth, nats", "bits a dimension")
POINTS = 100_000  # to train on
SIDE = 60  # points in a row of the densities' grids, or fewer with few points to measure
SHARED = dict(batch_size=256, lr_schedule="cosine")


class Denoiser(nn.Module):
    """(x [N, 2], c_noise [N]) -> [N, 2], zero at first."""

    def __init__(self, width: int = 128, depth: int = 3, waves: int = 5):
        super().__init__()
        self.layers = MLP(3, 2, width, depth, waves)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(torch.cat((x, t[:, None]), 1))


def flow_of(x: Tensor, steps: int, progress: bool = False) -> Flow:
    """A RealNVP of points x [K, 2]."""
    flow = RealNVP((2,), couplings=12, width=64, depth=2, waves=2, permutation="reverse")
    config = Config(**SHARED, steps=steps, lr=4e-3, warmup=steps // 20)
    return Trainer(flow, x, config).train(progress=progress)


def diffusion_of(x: Tensor, steps: int, progress: bool = False) -> Model:
    """A diffusion model of points x [K, 2], preconditioned and trained as by Karras et al. 2022.

    ln sigma is normal with mean -0.5, not -1.2: these data have a deviation of more than 1, and images of 0.5.
    """
    times = dict(times="log_normal", times_mean=-0.5, times_std=1.2)
    config = Config(**SHARED, steps=steps, lr=1e-2, warmup=steps // 20, label_dropout=0, **times)
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.default_generator.manual_seed(config.seed)
        network = Denoiser()
    process = EDM(sigma_data=x.square().mean().sqrt().item())
    model = Model(network, process, "edm", (2,), name="diffusion", clip=False)
    return Trainer(model, x, config).train(progress=progress)


def log_prob(model: Model, x: Tensor, tol: float) -> Tensor:
    """ln p of a diffusion model by its ODE, float64 [N]."""
    found = nll(model, x, "ode", levels=None, tol=tol, probes=None, batch_size=len(x), progress=False)
    return -found.bits * (x.shape[1] * math.log(2))


def figure(steps: int = 2000, n: int = 2000, progress: bool = True) -> Figure:
    """Train the flow for ``steps`` steps and the diffusion, whose steps are cheaper, for 2.5 times as many; measure n
    points."""
    rows, panels, side = [], [], min(SIDE, math.isqrt(2 * n))
    for name, make in DENSITIES.items():
        density = make()
        x, seen = density.draw(n, 1), density.draw(POINTS, 0)
        truth = density.log_prob(x)
        flow, model = flow_of(seen, steps, progress), diffusion_of(seen, 5 * steps // 2, progress)
        with torch.no_grad():
            found = {"truth": truth, "flow": flow.log_prob(x).double(), "diffusion": log_prob(model, x, 1e-4)}
            z = flow.encode(x)
            grids = {
                "data": density.log_prob(density.grid(side)),
                "flow": flow.log_prob(density.grid(side)),
                "diffusion": log_prob(model, density.grid(side).float(), 1e-3),
            }
        for who, log_p in found.items():
            nats = -log_p.mean().item()
            rows.append((name, who, nats, (truth - log_p).mean().item(), nats / (2 * math.log(2))))
        panels += [_plane(f"{name}: {who}", log_p, density) for who, log_p in grids.items()]
        axes = dict(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal")
        panels.insert(-1, Panel(f"{name}: z of the flow", points={"": z}, axes=axes))
    return Figure(COLUMNS, rows, panels, across=4)


def _plane(title: str, log_p: Tensor, density: Density) -> Panel:
    side, limit = math.isqrt(len(log_p)), density.limit
    axes = dict(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return Panel(title, log_p.exp().view(side, side), (-limit, limit, -limit, limit), axes=axes)
