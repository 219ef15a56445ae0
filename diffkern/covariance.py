"""A learned full covariance of the reverse step, for samples [N, D] of few dimensions (Sohl-Dickstein et al. 2015).

    p(x_prev | x_t) = N(mu, F F^T),   F = diag(std) C

mu and std are those of the variance "diagonal". C is lower triangular with ones on its diagonal, so that F is the
Cholesky factor. The network's output [N, D + D + D (D - 1) / 2] holds its prediction, v of each std, and the rows of C
below the diagonal one after another: where these are 0, "full" is "diagonal".

All of it is torch's operations: at so few dimensions a kernel would save nothing.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import ops
from .ops.arguments import as_index, look_up, wide
from .ops.diffusion_loss import LOSS_COLUMNS
from .ops.seeds import Seeds, as_seeds
from .ops.transforms import readable

MOST = 16  # dimensions: the network tells D (D + 3) / 2 numbers, and a factor has D^2


def most_channels(dimensions: int) -> int:
    """The channels of a network that tells a full covariance: D (D + 3) / 2."""
    return dimensions * (dimensions + 3) // 2


def channels(shape: Sequence[int]) -> int:
    """The channels of a network that tells a full covariance of samples of that shape.

    Raises ValueError unless it is (D,), with D of :data:`MOST` at most.
    """
    if len(shape) != 1 or shape[0] > MOST:
        raise ValueError(
            f"variance: expected another one than 'full', which is for samples of shape (D,) with D <= {MOST}, "
            f"for those of shape {tuple(shape)}, got 'full'"
        )
    return most_channels(shape[0])


def factor(out: Tensor, log_var_min: Tensor, log_var_max: Tensor) -> Tensor:
    """F of a network's output: [N, D (D + 3) / 2] -> [N, D, D], lower triangular.

    log_var_min, log_var_max  [N, 1] or [1, 1]: ln of the variance at v = -1 and at v = 1
    """
    dimensions = (math.isqrt(9 + 8 * out.shape[1]) - 3) // 2
    v, below = out[:, dimensions : 2 * dimensions], out[:, 2 * dimensions :]
    C = torch.eye(dimensions, dtype=out.dtype, device=out.device).repeat(len(out), 1, 1)
    for i in range(1, dimensions):
        first = i * (i - 1) // 2
        C[:, i, :i] = below[:, first : first + i]
    log_var = log_var_min + (v + 1) / 2 * (log_var_max - log_var_min)
    return (log_var / 2).exp()[:, :, None] * C


def bound(
    out: Tensor,
    x_0: Tensor,
    seeds: Seeds,
    step: int | Tensor,
    table: Tensor,
    *,
    address: int | Tensor | None = None,
    clip: bool = False,
    noise: Callable[..., Tensor] = ops.noise,
) -> Tensor:
    """Compute the term of the variational bound with a full covariance: float32 [N], bits a dimension.

    ::

        KL(N(mu_q, e^log_var_q I) || N(mu, F F^T)) / (D ln 2), mu_q - mu = c1 (x_0 - x0_hat)
        -ln N(x_0; x0_hat, F F^T) / (D ln 2) of the step to x_0

    out        [N, D (D + 3) / 2], of any floating-point dtype; the result of a float64 one is float64
    x_0        [N, D]
    table      float32 [rows, 12], of ``Objective(...).table(schedule, variance="full", first="density")``

    Other arguments are those of :func:`diffkern.ops.diffusion_loss`. Differentiable in ``out``: it trains the mean too.
    Raises ValueError for another shape of ``out``, and for a row with bins, whose mass has no closed form.
    """
    expected = len(x_0), channels(x_0.shape[1:])
    if out.shape != expected:
        raise ValueError(f"out: expected shape {expected}, got {tuple(out.shape)}")
    dimensions, device = x_0.shape[1], out.device
    step, seeds = as_index("step", step, device), as_seeds(seeds, device)
    row = dict(zip(LOSS_COLUMNS, look_up("step", step, table.double(), out), strict=True))
    if readable(row["first"]) and (row["first"] == 1).any():
        raise ValueError("table: expected first='density' with a full covariance, got 'bins'")
    at = step if address is None else as_index("address", address, device)
    eps = noise(seeds, x_0.shape[1:], step=at, stream=2)
    values, x_0 = out.double(), x_0.double()
    x0_hat = row["p_x"] * (row["a"] * x_0 + row["s"] * eps) + row["p_o"] * values[:, :dimensions]
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    F = factor(values, row["log_var_min"], row["log_var_max"])
    shift = (row["c1"] * (x_0 - x0_hat))[..., None]
    identity = torch.eye(dimensions, dtype=F.dtype, device=device).expand_as(F)
    white = torch.linalg.solve_triangular(F, torch.cat((shift, identity), 2), upper=False)  # F^-1 of both
    square, inverse = white[..., 0].square().sum(1), white[..., 1:].square().sum((1, 2))
    log_det = 2 * F.diagonal(dim1=1, dim2=2).log().sum(1)
    log_var_q, first = row["log_var_q"][:, 0], row["first"][:, 0]
    divergence = log_var_q.exp() * inverse - dimensions * (1 + log_var_q) + log_det + square
    density = dimensions * math.log(2 * math.pi) + log_det + square
    nats = torch.where(first == 2, density, divergence) / 2
    return (nats / (dimensions * math.log(2))).to(wide(out).dtype)
