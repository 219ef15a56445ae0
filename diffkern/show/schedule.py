"""Noise schedules, and how much of the data their last step still knows.

    SNR_t = alpha_bar_t / (1 - alpha_bar_t)                                               (Kingma et al. 2021)
    L_T   = KL(q(x_T | x_0) || N(0, I)) = -ln(1 - alpha_bar_T) / 2 nats a dimension       of data of mean 0, variance 1

The last schedule is ``linear``, rescaled to a terminal SNR of zero (Lin et al. 2024, algorithm 1).
"""

import math

import torch

from ..schedule import Schedule
from . import Figure, Panel

COLUMNS = ("schedule", "alpha_bar_T", "SNR_T", "prior KL, bits a dimension")


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """sqrt(alpha_bar), shifted to end at 0 and scaled to begin as before (Lin et al. 2024, algorithm 1)."""
    alpha = schedule.alpha_bar.sqrt()
    alpha_bar = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()
    return Schedule(torch.cat((schedule.betas[:1], 1 - alpha_bar[1:] / alpha_bar[:-1])))


def schedules(steps: int) -> dict[str, Schedule]:
    names = ("linear", "cosine", "sigmoid", "scaled_linear")
    made = {name: getattr(Schedule, name)(steps) for name in names}
    return made | {"linear, zero terminal SNR": zero_terminal_snr(made["linear"])}


def figure(steps: int = 1000) -> Figure:
    """Schedules of that many time steps."""
    rows, alpha_bar, log_snr = [], {}, {}
    t = torch.arange(steps, dtype=torch.float64, device="cpu")
    for name, schedule in schedules(steps).items():
        snr = schedule.alpha_bar / schedule.one_minus_alpha_bar
        prior = -schedule.one_minus_alpha_bar[-1].log().item() / (2 * math.log(2))
        rows.append((name, schedule.alpha_bar[-1].item(), snr[-1].item(), abs(prior)))
        alpha_bar[name] = t, schedule.alpha_bar
        log_snr[name] = t[snr > 0], snr[snr > 0].log()
    panels = [Panel(title, lines=lines, axes=dict(xlabel="t"))
              for title, lines in (("alpha_bar", alpha_bar), ("ln SNR", log_snr))]  # fmt: skip
    return Figure(COLUMNS, rows, panels)
