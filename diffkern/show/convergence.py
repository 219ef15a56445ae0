"""The order of solvers of the probability-flow ODE: error over network calls.

    error(calls) ~ calls^-order

Data are a mixture of two Gaussians in one dimension. The ODE keeps the rank of a point, so that its solution is known:
x_t = F_t^-1(F_T(x_T)), with F_t the distribution function of x_t. Samplers run in float64 with the exact network. The
table has the root mean square error at the end of the run, for a budget of calls, and the order from the last two.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..process import EDM, VP, Grid, Point, RectifiedFlow
from ..program import Direct
from ..samplers import SAMPLERS
from . import Figure, Panel, sampler_of
from .gaussians import Gaussians

DATA = Gaussians([[-1.0], [0.8]], [0.6, 0.4], [0.4, 0.6])
CALLS = (12, 24, 48, 96, 192)
GRIDS = {
    "vp": lambda steps: VP().grid(steps, "lambda", denoise=False),
    "edm": lambda steps: EDM().grid(steps, denoise=False),
    "flow": lambda steps: RectifiedFlow().grid(steps),
}


def start_and_end(grid: Grid, n: int) -> tuple[Tensor, Tensor]:
    """n points of the distribution where the grid begins, and where the ODE takes them: float64 [n, 1] each."""
    p = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n
    first, last = grid.points[0], grid.points[-1]
    return tuple(DATA.quantile(p, at.alpha, at.sigma)[:, None] for at in (first, last))


def _denoise(x: Tensor, s: Point) -> Tensor:
    return DATA.predict(x, s.alpha, s.sigma)[0]


def _no_noise(address: int, count: int) -> Tensor:
    raise ValueError("samplers: expected solvers of the ODE, got one that draws noise")


def error(name: str, options: dict[str, Any], process: str, calls: int, n: int) -> float:
    """The root mean square error of a sampler that may call the network that often."""
    grid = GRIDS[process](calls // SAMPLERS[name].calls)
    x_T, exact = start_and_end(grid, n)
    x = SAMPLERS[name](Direct(grid, _denoise, _no_noise, x_T), grid, **options)
    found = (x - exact).square().mean().sqrt().item()
    if not math.isfinite(found):
        raise ValueError(f"samplers: expected ones that start on the process {process}, got {name!r}")
    return found


def figure(
    samplers: Sequence[str] = ("ddim", "dpmpp_2m", "unipc", "dpmpp_3m"), process: str = "vp", n: int = 100
) -> Figure:
    """n points, by deterministic samplers, as unipc or unipc,order=3, on the process vp, edm or flow."""
    if process not in GRIDS:
        raise ValueError(f"process: expected one of {', '.join(GRIDS)}, got {process!r}")
    rows, lines = [], {}
    for text in samplers:
        name, options = sampler_of(text)
        errors = [error(name, options, process, calls, n) for calls in CALLS]
        rows.append((text, *errors, math.log2(errors[-2] / errors[-1])))
        lines[text] = tuple(torch.tensor(values, dtype=torch.float64, device="cpu") for values in (CALLS, errors))
    axes = dict(xlabel="network calls", xscale="log", yscale="log", ylabel="rms error")
    columns = ("sampler", *(f"{calls} calls" for calls in CALLS), "order")
    return Figure(columns, rows, [Panel(f"error on the ODE ({process})", lines=lines, axes=axes)])
