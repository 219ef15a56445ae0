"""The unknown coordinate of a point, given the other one, by four ways to inpaint.

    p(y | x = 0.7)    of a mixture of three Gaussians: a mixture of three again, with other weights

Inpainting keeps x by a blend after each step. RePaint goes through each stretch of steps again. PiGDM guides by the
gradient of ln p(x = 0.7 | x_t). The network is exact, and so each error is the method's. The table has the mean and the
standard deviation of y, and the largest difference between its distribution and the exact one (Kolmogorov & Smirnov).
"""

import math
from typing import Any

import torch

from ..constraints import Inpaint
from ..guidance import Guidance, PiGDM
from ..sampling import sample
from ..schedule import Schedule
from . import Figure, Panel
from .gaussians import Gaussians, critical

DATA = Gaussians([[-1.0, -1.0], [0.0, 0.3], [1.0, 1.0]], [0.4, 0.3, 0.4])
KNOWN = 0.7
COLUMNS = ("method", "network calls", "mean of y", "std of y", "distance", "critical")


def conditional(data: Gaussians, known: float) -> Gaussians:
    """The mixture of y given x = known."""
    x = torch.tensor([[known]], dtype=torch.float64, device="cpu")
    weights = Gaussians(data.means[:, :1], data.stds, data.weights).log_parts(x)[0].softmax(0)
    return Gaussians(data.means[:, 1:], data.stds, weights)


def methods(steps: int) -> dict[str, dict[str, Any]]:
    """The arguments of ``sample`` by method."""
    x, mask = (torch.tensor([row], dtype=torch.float32, device="cpu") for row in ([KNOWN, 0.0], [0.0, 1.0]))
    measured = PiGDM(lambda point: point[:, :1], x[:, :1], data_std=0.9)
    return {
        "Inpaint": dict(constraint=Inpaint(x, mask), steps=steps),
        "RePaint, resample 5": dict(constraint=Inpaint(x, mask, resample=5), steps=steps),
        "RePaint, resample 20": dict(constraint=Inpaint(x, mask, resample=20), steps=steps),
        "PiGDM": dict(guidance=Guidance(measurement=measured), steps=steps),
    }


def figure(n: int = 2000, steps: int = 50) -> Figure:
    """n points of each method, in some steps of ddpm."""
    exact, model = conditional(DATA, KNOWN), DATA.model(Schedule.linear())
    bins = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64, device="cpu")
    middles, width = (bins[1:] + bins[:-1]) / 2, bins[1] - bins[0]
    mean = exact.weights @ exact.means[:, 0]
    std = (exact.weights @ (exact.stds.square() + (exact.means[:, 0] - mean).square())).sqrt()
    rows = [("exact", 0, mean.item(), std.item(), math.nan, critical(n))]
    lines = {"exact": (middles, exact.log_prob(middles[:, None]).exp())}
    for name, options in methods(steps).items():
        calls = []
        x = sample(model, n, sampler="ddpm", batch_size=n, progress=False, callback=calls.append, **options)
        y = x[:, 1].double()
        rows.append((name, len(calls), y.mean().item(), y.std().item(), exact.distance(y), critical(n)))
        lines[name] = middles, torch.histogram(y, bins).hist / (n * width)
    return Figure(COLUMNS, rows, [Panel(f"p(y given x = {KNOWN:g})", lines=lines, axes=dict(xlabel="y"))])
