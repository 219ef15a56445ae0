"""Images that become white noise by the forward process.

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                               (Ho et al. 2020, eq. 4)

Images of the model that ships are noised by ``ops.q_sample``. The table has the mean and the standard deviation of all
pixels, their correlation with x_0 and the one that the equation says, and the correlation of a pixel with the next one
in its row. With std the standard deviation of x_0, the correlation is sqrt(alpha_bar) std / sqrt(alpha_bar std^2 + 1 -
alpha_bar): sqrt(alpha_bar) for data of unit variance, and nearly sqrt(alpha_bar) std at the end.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..evaluate import labels_in_turn
from ..model import load
from ..sampling import sample
from ..schedule import Schedule
from . import Figure, Panel

COLUMNS = ("t", "sqrt(alpha_bar)", "mean", "std", "correlation with x_0", "expected", "with the next pixel")


def figure(n: int = 8, steps: int = 20, progress: bool = True) -> Figure:
    """n images, drawn in some steps."""
    model = load("fashion-mnist")
    x_0 = sample(model, n, labels=labels_in_turn(model, n), steps=steps, progress=progress)
    T = model.schedule.T
    return noised(x_0, model.schedule, [*range(0, T - 1, T // 10), T - 1])


def noised(x_0: Tensor, schedule: Schedule, times: Sequence[int]) -> Figure:
    """The forward process of images [N, C, H, W] at some time steps; the picture has their first channel."""
    seeds, table = torch.arange(len(x_0), dtype=torch.int64, device="cpu"), schedule.q_table()
    std, rows, columns = x_0.double().std().item(), [], []
    for time in times:
        x_t = ops.q_sample(x_0, torch.full_like(seeds, time), seeds, table)
        alpha, sigma = schedule.alpha_bar[time].sqrt().item(), schedule.one_minus_alpha_bar[time].sqrt().item()
        rows.append((
            *(time, alpha, x_t.double().mean().item(), x_t.double().std().item(), correlation(x_t, x_0)),
            alpha * std / math.hypot(alpha * std, sigma),
            correlation(x_t[..., 1:], x_t[..., :-1]),
        ))  # fmt: skip
        columns.append(x_t[:, 0].flatten(0, 1))
    image = torch.cat(columns, 1).clamp(-1, 1).flip(0)
    width = x_0.shape[3]
    ticks = dict(xticks=[(i + 0.5) * width for i in range(len(times))], xticklabels=list(times), yticks=[])
    extent = (0.0, float(image.shape[1]), 0.0, float(image.shape[0]))
    panel = Panel("forward process", image, extent, "gray", axes=dict(xlabel="t", aspect="equal", **ticks))
    return Figure(COLUMNS, rows, [panel])


def correlation(a: Tensor, b: Tensor) -> float:
    """The correlation of the values of two tensors of one shape."""
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten())).double())[0, 1].item()
