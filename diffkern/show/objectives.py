"""The weight of each objective: the factor of the squared error of eps at each level of noise.

    loss = weight(SNR) |eps - eps_hat|^2,    |eps - eps_hat|^2 = SNR |x_0 - x0_hat|^2

All objectives are one error, weighted. The table is for alpha^2 + sigma^2 = 1. How often a level is drawn multiplies
the weight: ``edm`` draws ln sigma from N(-1.2, 1.2^2), the others t uniformly unless told otherwise.
"""

import numpy as np
import torch

from ..training import objectives
from ..training.objectives import Objective
from . import Figure, Panel

SNR = (0.01, 0.1, 1.0, 10.0, 100.0)


def made() -> dict[str, Objective]:
    return {
        "simple, eps": objectives.simple("eps"),
        "simple, x0": objectives.simple("x0"),
        "simple, v": objectives.simple("v"),
        "min_snr": objectives.min_snr(),
        "p2": objectives.p2(),
        "edm": objectives.edm(),
        "flow": objectives.flow(),
    }


def eps_weight(objective: Objective, snr: np.ndarray) -> torch.Tensor:
    """The factor of the squared error of eps, float64 [len(snr)]."""
    alpha, sigma = np.sqrt(snr / (1 + snr)), 1 / np.sqrt(1 + snr)
    rows = objective.rows(objectives.levels(alpha, sigma), "cpu").double()
    weight, p_o = rows[:, 4], rows[:, 6]
    return weight / (p_o.square() * torch.from_numpy(snr))


def figure(n: int = 100) -> Figure:
    """Lines of n points."""
    snr, rows, lines = np.geomspace(1e-3, 1e3, n), [], {}
    for name, objective in made().items():
        rows.append((name, *eps_weight(objective, np.array(SNR)).tolist()))
        lines[name] = torch.from_numpy(snr), eps_weight(objective, snr)
    axes = dict(xlabel="SNR", xscale="log", yscale="log")
    columns = ("objective", *(f"SNR {value:g}" for value in SNR))
    return Figure(columns, rows, [Panel("weight of the error of eps", lines=lines, axes=axes)])
