"""How much image and how much noise each process has at each time.

    x_t = alpha(t) x_0 + sigma(t) eps,    lambda(t) = ln(alpha(t) / sigma(t))

A solver knows a process by lambda alone, half of the log-SNR. The table has the ends of each process, and what the
network is told at its noisy end.
"""

import torch

from ..process import EDM, VE, VP, Process, RectifiedFlow, SubVP
from ..schedule import Schedule
from . import Figure, Panel

COLUMNS = ("process", "t", "alpha at the end", "sigma at the end", "lambda at the image", "lambda at the end", "told")


def processes() -> dict[str, Process]:
    made = {"Schedule.linear()": Schedule.linear(), "Schedule.cosine()": Schedule.cosine()}
    return made | {f"{maker.__name__}()": maker() for maker in (VP, SubVP, VE, EDM, RectifiedFlow)}


def figure(n: int = 200) -> Figure:
    """At n times of each process, evenly from the image to the noise."""
    rows, alphas, lambdas = [], {}, {}
    part = torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")
    for name, process in processes().items():
        low, high = process.t_min, process.t_max
        points = [process.point(low + fraction * (high - low)) for fraction in part.tolist()]
        first, last = points[0], points[-1]
        rows.append((name, f"{low:g} to {high:g}", last.alpha, last.sigma, first.lam, last.lam, last.c_noise))
        for lines, values in ((alphas, [p.alpha for p in points]), (lambdas, [p.lam for p in points])):
            y = torch.tensor(values, dtype=torch.float64, device="cpu")
            lines[name] = part[y.isfinite()], y[y.isfinite()]
    axes = dict(xlabel="part of the way from t_min to t_max")
    panels = [Panel("alpha", lines=alphas, axes=axes), Panel("lambda", lines=lambdas, axes=axes | dict(ylim=(-12, 8)))]
    return Figure(COLUMNS, rows, panels)
