"""How a batch is noised and its loss measured: at the time steps of a schedule, or at real times of a process."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..process import Process
from .objectives import Objective, levels_at
from .times import steps


@dataclass(frozen=True)
class Noised:
    """The noise levels of N examples: the row of each in two tables, its noise's address, and what the network is told.

    t        [N]: int64 of a schedule's time steps, else float32
    step     int64 [N], the rows
    address  of the noise; None is ``step``
    q_table  float32 [rows, 2], of ``ops.q_sample``: the network gets c_in x_t
    table    float32 [rows, 12], of ``ops.diffusion_loss``; None: the error of eps, by ``ops.noise_loss``
    """

    t: Tensor
    step: Tensor
    address: int | None
    q_table: Tensor
    table: Tensor | None


class Noising:
    """The tables of an objective on a process, on ``device``.

    A schedule has two for all its time steps. At real times a batch has its own, with a row for each example.
    Raises ValueError for an objective that this process has not.
    """

    def __init__(self, objective: Objective, process: Process, variance: str, device: torch.device):
        self.objective, self.process, self.device = objective, process, device
        self.terms, self.q_table, self.table = None, None, None
        if not process.discrete:
            objective.rows(levels_at(process, [process.t_max / 2]))  # raises now what every batch would raise
            return
        steps(objective.t, [0], process.T)
        self.terms, self.q_table = process.T, process.q_table(device)
        if (objective.prediction, objective.weight, objective.vlb) != ("eps", 1.0, 0.0):
            self.table = objective.table(process, device, variance=variance)

    def at(self, t: Tensor) -> Noised:
        """Return the noise levels of examples at t [N], time steps int64 or real times float64."""
        if self.process.discrete:
            t = t.to(self.device)
            return Noised(t, t, None, self.q_table, self.table)
        levels = levels_at(self.process, t.numpy())
        table = self.objective.rows(levels)
        c_in = torch.as_tensor(self.process.c_in(levels), dtype=torch.float64, device="cpu")
        alpha_sigma = torch.from_numpy(levels.alpha), torch.from_numpy(levels.sigma)
        q_table = torch.stack([c_in * column for column in alpha_sigma], 1).float()
        told = torch.as_tensor(self.process.c_noise(t.numpy()), dtype=torch.float32, device="cpu")
        rows = torch.arange(len(t), dtype=torch.int64, device=self.device)
        return Noised(*(x.to(self.device) for x in (told, rows)), 0, *(x.to(self.device) for x in (q_table, table)))

    def loss(self, out: Tensor, x_0: Tensor, seeds: Tensor, at: Noised, *, learned_variance: bool = False) -> Tensor:
        """Each example's loss, float32 [N]. The eps of x_t is drawn again rather than stored."""
        if at.table is None:
            return ops.noise_loss(out, seeds, at.step)
        options = dict(address=at.address, terms=self.terms, learned_variance=learned_variance)
        return self.objective.loss(out.float(), x_0, seeds, at.step, at.table, **options)
