"""Short tables: a sampler's rows on a schedule, in the columns that ``ops.reverse_step`` had first.

float64 [steps, 9 + J]: a row for each time step in the order visited, the columns ``ops.COLUMNS`` and then one for each
of J history tensors. The only thing that they keep is the x0_hat of the row before.

    x0_hat = p_x x_t + p_o out                                             (clamped to [-1, 1] or not)
    x_prev = k_x x_t + k_o out + k_0 x0_hat + sum_j k_j h_j + sigma z
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..program import Program
from ..schedule import Schedule
from .registry import Sampler


def short_table(
    sampler: Sampler, schedule: Schedule, timesteps: Sequence[int], prediction: str = "eps", *args: Any, **options: Any
) -> Tensor:
    """The rows of a sampler that calls the network once a step and keeps x0_hat at most.

    timesteps, prediction  decreasing time steps; what the network's output is
    args, options          of the sampler
    """
    options = dict(zip(sampler.options, args, strict=False)) | options
    table = short_rows(sampler.trace(schedule.grid(timesteps), prediction, **options), sampler.slots)
    if options.get("variance") == "learned":  # the last row has these too, though it draws no noise
        respaced = schedule.respace(timesteps)
        table[-1, 6:8] = torch.stack((respaced.posterior_log_variance[0], respaced.betas[0].log()))
    return table


def short_rows(program: Program, slots: int = 0) -> Tensor:
    """The rows of a program as a short table, with that many slots at least. ValueError where they do not fit."""
    if program.slots > 1 or any(row.point is None or row.q not in ((0, 0, 0), (0, 0, 1)) for row in program.rows):
        raise ValueError("sampler: expected one that keeps x0_hat alone, with a network call in each row")
    if program.correlated:
        raise ValueError("variance: expected one without correlations in a short table, got 'full'")
    if any(row.noise and (row.noise.address, row.noise.count) != (row.point.time, 1) for row in program.rows):
        raise ValueError("sampler: expected one that draws the noise of each time step once")
    rows = []
    for row in program.rows:
        log_var = (row.noise and row.noise.log_var) or (0.0, 0.0)
        columns = (row.p_x, row.p_o, row.k_x, row.k_o, row.k_0, row.sigma, *log_var, row.point.time)
        rows.append([*columns, *(row.slots.get(slot, 0.0) for slot in range(max(slots, program.slots)))])
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def fold_x0(table: Tensor) -> Tensor:
    """The same steps with x0_hat written out (k_0 = 0), which is what they are when nothing is clipped.

    Of ``ddpm`` with eps prediction it is algorithm 2 as printed: x_prev = (x_t - beta / sqrt(1 - ab) eps) / sqrt(alpha)
    + sigma z.
    """
    p_x, p_o, k_x, k_o, k_0, *rest = table.unbind(1)
    return torch.stack((p_x, p_o, k_x + k_0 * p_x, k_o + k_0 * p_o, torch.zeros_like(k_0), *rest), 1)
