"""Samplers: each an equation, written as a table of coefficients for the one kernel ``ops.reverse_step``.

A table is float64 [steps, 9 + J]: a row for each time step in the order visited, the columns ``ops.COLUMNS`` and then
one for each of J history tensors. A row says

    x0_hat = p_x x_t + p_o out                                             (clamped to [-1, 1] or not)
    x_prev = k_x x_t + k_o out + k_0 x0_hat + sum_j k_j h_j + sigma z

where ``out`` is the network's and "prev" is the next step listed, x_0 after the last. The prediction type is p_x and
p_o alone; a sampler is the rest. Cast to float32 last: ``table.float()``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .schedule import Schedule, checked_float

SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")
PREDICTIONS = ("eps", "x0", "v", "score")
VARIANCES = ("fixed_small", "fixed_large", "learned")


def default_sampler(steps: int | None, T: int) -> str:
    """ddpm for all of the T steps (None), ddim for fewer, where it is the better one (Song et al. 2021, table 1)."""
    return "ddpm" if steps in (None, T) else "ddim"


def ddpm(
    schedule: Schedule,
    timesteps: Sequence[int],
    prediction: str = "eps",
    variance: str | Tensor = "fixed_small",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), by the posterior mean (eq. 7), so that x0_hat can be clipped:

        x_prev = c1 x0_hat + c2 x_t + sigma z

    timesteps: strictly decreasing; fewer than T of them are the respaced process of Nichol & Dhariwal 2021.
    prediction: what the network's output is: "eps", "x0", "v" or "score".
    variance: sigma^2 is beta_tilde ("fixed_small"), beta ("fixed_large"), or exp(u log beta + (1-u) log beta_tilde)
    with u the second half of the network's output ("learned", Nichol & Dhariwal 2021, eq. 15), and 0 at the last step
    in each case; or a tensor of variances >= 0, one for each of ``timesteps`` in their order, taken as they are.
    Returns [steps, 9], float64. ValueError: an unknown name, or eps or score at alpha_bar = 0.
    """
    s = schedule.respace(timesteps)
    log_variances = {}
    if isinstance(variance, Tensor):
        sigma = _variances(variance, s.T).flip(0).sqrt()
    elif variance in VARIANCES:
        fixed = {"fixed_small": s.posterior_variance, "fixed_large": s.betas, "learned": torch.ones_like(s.betas)}
        sigma = fixed[variance].sqrt()
        sigma[0] = 0
        if variance == "learned":
            log_variances = dict(log_var_min=s.posterior_log_variance, log_var_max=s.betas.log())
    else:
        raise ValueError(f"variance: expected one of {VARIANCES} or a tensor of variances, got {variance!r}")
    return _table(s, timesteps, prediction, k_x=s.posterior_xt, k_0=s.posterior_x0, sigma=sigma, **log_variances)


def ddim(schedule: Schedule, timesteps: Sequence[int], prediction: str = "eps", eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, eqs. 12 and 16), with eps = (x_t - sqrt(ab) x0_hat) / sqrt(1 - ab) of the clipped x0_hat:

        x_prev = sqrt(ab_prev) x0_hat + d eps + sigma z,    d = sqrt(1 - ab_prev - sigma^2)
        sigma  = eta sqrt((1 - ab_prev) / (1 - ab)) sqrt(1 - ab / ab_prev)

    eta: 0 is deterministic, 1 is ``ddpm`` with beta_tilde. timesteps, prediction, errors: as ``ddpm``'s.
    Returns [steps, 9], float64.
    """
    eta = checked_float("eta", eta, "a number in [0, 1]", lambda value: 0 <= value <= 1)
    s = schedule.respace(timesteps)
    sigma = eta * s.posterior_variance.sqrt()
    # d^2 = 1 - ab_prev - sigma^2 as a sum of positive terms
    shrink = (1 - eta**2) + eta**2 * s.alphas * s.one_minus_alpha_bar_prev / s.one_minus_alpha_bar
    k_x = (s.one_minus_alpha_bar_prev * shrink / s.one_minus_alpha_bar).sqrt()  # d / sqrt(1 - ab)
    k_0 = s.alpha_bar_prev.sqrt() - k_x * s.alpha_bar.sqrt()
    return _table(s, timesteps, prediction, k_x=k_x, k_0=k_0, sigma=sigma)


def dpmpp_2m(schedule: Schedule, timesteps: Sequence[int], prediction: str = "eps") -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): the ODE of ``ddim`` to second order, by the x0_hat before.

        x_prev = sqrt((1 - ab_prev) / (1 - ab)) x_t + sqrt(ab_prev) (1 - e^-h) ((1 + c) x0_hat - c x0_hat_before)
        c      = h / (2 h_before)

    h is a step's length in lambda = ln sqrt(ab / (1 - ab)). The first step, which has nothing before it, and the last,
    which is infinitely long, have c = 0: they are ``ddim``'s. timesteps, prediction, errors: as ``ddpm``'s.
    Returns [steps, 10], float64: the history tensor is the x0_hat of the step before.
    """
    s = schedule.respace(timesteps)
    log_snr = (s.alpha_bar.log() - s.one_minus_alpha_bar.log()) / 2
    h = (s.alpha_bar_prev.log() - s.one_minus_alpha_bar_prev.log()) / 2 - log_snr
    c = torch.zeros_like(h)
    c[1:-1] = h[1:-1] / (2 * h[2:])
    k_x = (s.one_minus_alpha_bar_prev / s.one_minus_alpha_bar).sqrt()
    gain = s.alpha_bar_prev.sqrt() * -torch.expm1(-h)
    return _table(s, timesteps, prediction, k_x=k_x, k_0=gain * (1 + c), history=[-gain * c])


def fold_x0(table: Tensor) -> Tensor:
    """The same steps with x0_hat written out (k_0 = 0), which is what they are when nothing is clipped.

    Of ``ddpm`` with eps prediction it is algorithm 2 as printed: x_prev = (x_t - beta / sqrt(1 - ab) eps) / sqrt(alpha)
    + sigma z.
    """
    p_x, p_o, k_x, k_o, k_0, *rest = table.unbind(1)
    return torch.stack((p_x, p_o, k_x + k_0 * p_x, k_o + k_0 * p_o, torch.zeros_like(k_0), *rest), 1)


def _x0_hat(s: Schedule, prediction: str) -> tuple[Tensor, Tensor]:
    """(p_x, p_o): x_0 from x_t and what the network predicts."""
    a, sigma = s.alpha_bar.sqrt(), s.one_minus_alpha_bar.sqrt()  # x_t = a x_0 + sigma eps
    if prediction == "x0":
        return torch.zeros_like(a), torch.ones_like(a)
    if prediction == "v":  # v = a eps - sigma x_0 (Salimans & Ho 2022, appendix D)
        return a, -sigma
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")
    if not a.reciprocal().float().isfinite().all():
        raise ValueError(
            f"prediction: expected 'v' or 'x0' where alpha_bar falls to {s.alpha_bar[-1].item():.3g} "
            f"(x_0 cannot be told from noise alone), got {prediction!r}"
        )
    return 1 / a, -sigma / a if prediction == "eps" else s.one_minus_alpha_bar / a  # score = -eps / sigma


def _table(
    s: Schedule, timesteps: Sequence[int], prediction: str, *, history: Sequence[Tensor] = (), **columns: Tensor
) -> Tensor:
    """Columns over a respaced schedule, in its ascending order, to rows in the order visited; absent columns are 0."""
    p_x, p_o = _x0_hat(s, prediction)
    t = torch.tensor([int(t) for t in reversed(timesteps)], dtype=torch.float64, device="cpu")
    columns = {name: torch.zeros_like(t) for name in ops.COLUMNS} | columns | dict(p_x=p_x, p_o=p_o, t=t)
    return torch.stack((*columns.values(), *history), 1).flip(0)


def _variances(variance: Tensor, steps: int) -> Tensor:
    if variance.shape != (steps,):
        raise ValueError(f"variance: expected shape ({steps},), one for each step, got {tuple(variance.shape)}")
    variance = variance.detach().to("cpu", torch.float64)
    if not (variance.isfinite() & (variance >= 0)).all():
        raise ValueError(f"variance: expected finite variances >= 0, got {variance.tolist()}")
    return variance
