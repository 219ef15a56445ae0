"""Training losses: the squared error of the network's output, and the term of the variational bound."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .arguments import as_index, check_shape, device_of, look_up, wide
from .example import DTYPES, Example, label, normal, one, steps, uniform
from .example import seeds as example_seeds
from .noise import composite as noise_composite
from .noise import reference as noise_reference
from .registration import BY_TORCH, Op, fake, gradient, native, refuse_gradient, same_device
from .seeds import Seeds, as_seeds
from .transforms import by_torch, readable

LOSS_COLUMNS = (
    *("a", "s"),
    *("y_x", "y_e", "weight"),
    *("p_x", "p_o", "c1"),
    *("log_var_q", "log_var_min", "log_var_max"),
    "first",
)
"""The columns of the table of :func:`diffusion_loss`."""

op = Op("diffusion_loss")


def diffusion_loss(
    out: Tensor,
    x_0: Tensor | None,
    seeds: Seeds,
    step: int | Tensor,
    table: Tensor,
    *,
    address: int | Tensor | None = None,
    weights: Tensor | None = None,
    learned_variance: bool = False,
    bound: bool = False,
    stop_mean: bool = True,
    clip: bool = False,
) -> Tensor:
    """Compute the loss of any prediction, and the term of the variational bound, by a row of coefficients.

    With o the network's output for x_t = a x_0 + s eps (:func:`q_sample`), whose eps is made again in the kernel::

        mse    = weights_n weight mean (o - y_x x_0 - y_e eps)^2
        x0_hat = p_x (a x_0 + s eps) + p_o o, clamped to [-1, 1] with ``clip``
        bound  = mean KL(N(mu_q, e^log_var_q) || N(mu, e^log_var)) / ln 2, mu_q - mu = c1 (x_0 - x0_hat)

    log_var is log_var_max, or with ``learned_variance`` between log_var_min and log_var_max, by out's second half
    (Nichol & Dhariwal 2021, eq. 15). In a row whose ``first`` is not 0 the bound's term is that of the step which ends
    at x_0, under N(x0_hat, e^log_var): with 1, -log2 P of the bin of x_0, one of 256 in [-1, 1] (Ho et al. 2020, eq.
    13), with 2, -log2 of the density there.

    out               [N, ...]; [N, 2C, ...] with ``learned_variance``
    x_0               [N, ...], float32 or of out's dtype; or None, where every y_x is 0 and without ``bound``
    seeds             int64 [N]: eps is ``noise(seeds, shape, step=address, stream=2)``
    step              the row: one, or an int64 tensor [N]. Out of range: raises on the CPU, gives NaN on CUDA
    table             float32 [rows, 12]: :data:`LOSS_COLUMNS`, as :mod:`diffkern.training.objectives` makes them
    address           the noise's step, in [0, 2^32): one, or int64 [N]; None is ``step``
    weights           float32 [N] or None
    learned_variance  out's second half interpolates the log-variance
    bound             also return the bound's term
    stop_mean         the bound's term has a gradient by the second half alone (Nichol & Dhariwal 2021, section 3.1)
    clip              as the sampler does

    Returns float32 [N], the mse; with ``bound`` [N, 2], the mse and the bound's term in bits a dimension.
    Differentiable in ``out``. Errors as in :mod:`diffkern.ops`.
    """
    device = device_of(out)
    seeds, step = as_seeds(seeds, device), as_index("step", step, device)
    address = None if address is None else as_index("address", address, device)
    options = (learned_variance, bound, stop_mean, clip)
    arguments = (out, x_0, seeds, step, table, address, weights, *options)
    op.check(arguments)
    if bound and x_0 is None:
        raise ValueError("x_0: expected a tensor with bound=True, got None")
    if by_torch(*arguments):
        return composite(*arguments)
    refuse_gradient("diffusion_loss", [("x_0", x_0), ("table", table), ("weights", weights)], BY_TORCH)
    return op(*arguments)


@fake("diffusion_loss", differentiable=True)
def _(out, x_0, seeds, step, table, address, weights, learned_variance, bound, stop_mean, clip):
    same_device(out, x_0=x_0, seeds=seeds, step=step, table=table, address=address, weights=weights)
    return out.new_empty((out.shape[0], 2) if bound else out.shape[:1], dtype=torch.float32)


@fake("diffusion_loss_backward")
def _(grad_loss, out, x_0, seeds, step, table, address, weights, learned_variance, bound, stop_mean, clip):
    tensors = dict(x_0=x_0, seeds=seeds, step=step, table=table, address=address, weights=weights)
    same_device(out, grad_loss=grad_loss, **tensors)
    return torch.empty_like(out)


def _save(ctx, inputs, output):
    *tensors, ctx.learned_variance, ctx.bound, ctx.stop_mean, ctx.clip = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_loss):
    options = (ctx.learned_variance, ctx.bound, ctx.stop_mean, ctx.clip)
    grad_out = native.diffusion_loss_backward(grad_loss.contiguous(), *ctx.saved_tensors, *options)
    return grad_out, *[None] * 10


gradient("diffusion_loss", _backward, _save)

# --- composite and reference -------------------------------------------------------------------------------------


def composite(
    out: Tensor,
    x_0: Tensor | None,
    seeds: Tensor,
    step: Tensor,
    table: Tensor,
    address: Tensor | None = None,
    weights: Tensor | None = None,
    learned_variance: bool = False,
    bound: bool = False,
    stop_mean: bool = True,
    clip: bool = False,
    *,
    noise: Callable[..., Tensor] = noise_composite,
) -> Tensor:
    """See :func:`diffkern.ops.diffusion_loss`. float64 of an ``out`` that is float64."""
    n = out.shape[0]
    o, *second_half = wide(out).chunk(2, 1) if learned_variance else (wide(out),)
    check_shape("x_0", x_0, tuple(o.shape))
    check_shape("seeds", seeds, (n,))
    check_shape("weights", weights, (n,))
    check_shape("table", table, (table.shape[0], len(LOSS_COLUMNS)))
    row = dict(zip(LOSS_COLUMNS, look_up("step", step, table, out), strict=True))
    eps = noise(seeds, o.shape[1:], step=step if address is None else address, stream=2)
    target = row["y_e"] * eps
    if x_0 is not None:
        target = row["y_x"] * wide(x_0) + target
    elif readable(row["y_x"]) and row["y_x"].any():
        raise RuntimeError("x_0: expected a tensor where y_x of the table is not 0, got None")
    else:
        target = torch.where(row["y_x"] == 0, target, torch.nan)
    mse = _mean((o - target).square()) * row["weight"].flatten()
    if weights is not None:
        mse = mse * weights
    if not bound:
        return mse
    x_0, least, most = wide(x_0), row["log_var_min"], row["log_var_max"]
    x0_hat = row["p_x"] * (row["a"] * x_0 + row["s"] * eps) + row["p_o"] * (o.detach() if stop_mean else o)
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    log_var = least + (second_half[0] + 1) / 2 * (most - least) if learned_variance else most.expand(o.shape)
    return torch.stack((mse, _mean(_nats(x_0, x0_hat, log_var, row)) / math.log(2)), 1)


def _mean(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(1).mean(1)


def _nats(x_0: Tensor, x0_hat: Tensor, log_var: Tensor, row: dict[str, Tensor]) -> Tensor:
    """Each element's term of the bound."""
    square = (row["c1"] * (x_0 - x0_hat)).square() * (-log_var).exp()
    ratio = row["log_var_q"] - log_var
    divergence, density = (ratio.expm1() - ratio + square) / 2, (math.log(2 * math.pi) + log_var + square) / 2
    in_bin, in_density = row["first"] == 1, row["first"] == 2
    elsewhere = ~in_bin  # where a bin's term, that is not used, must still have a finite gradient
    bits = _bin_nats(x_0, torch.where(elsewhere, x_0.detach(), x0_hat), torch.where(elsewhere, 0.0, log_var))
    return torch.where(in_bin, bits, torch.where(in_density, density, divergence))


def _bin_nats(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-ln P(x - 1/255 < N(mean, e^log_var) < x + 1/255), open at -1 and 1, from Phi in its lower tail."""
    precision = (log_var / -2).exp()
    low, high = ((x + side / 255 - mean) * precision for side in (-1, 1))
    mirrored = (x > 0.999) | ((low + high > 0) & (x > -0.999))
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high = _log_ndtr(high)
    open_ended = x.abs() > 0.999
    less = torch.where(open_ended, -1.0, _log_ndtr(low) - log_high)
    return -log_high - torch.where(open_ended, 0.0, torch.log1p(-less.exp()))


def _log_ndtr(x: Tensor) -> Tensor:
    """ln Phi(x), as ``torch.special.log_ndtr``, which has no rule for vmap."""
    below, above = x.clamp(max=0), x.clamp(min=0)
    lower = (torch.special.erfcx(below / -math.sqrt(2)) / 2).log() - below.square() / 2
    return torch.where(x < 0, lower, torch.log1p(torch.erfc(above / math.sqrt(2)) / -2))


def reference(
    out: Tensor,
    x_0: Tensor | None,
    seeds: Tensor,
    step: Tensor,
    table: Tensor,
    *,
    weights: Tensor | None = None,
    **options,
) -> Tensor:
    """See :func:`diffkern.ops.diffusion_loss`; computed in float64."""
    x_0, weights = (None if tensor is None else tensor.double() for tensor in (x_0, weights))
    options.setdefault("noise", noise_reference)
    return composite(out.double(), x_0, seeds, step, table.double(), weights=weights, **options).float()


# --- examples ----------------------------------------------------------------------------------------------------


def _example_table() -> Tensor:
    """Five rows in order: KL, a bin, a density, KL, a bin. The log-variances lie in [-4, -1]."""
    table = uniform(5, len(LOSS_COLUMNS)) - 0.5
    log_var = LOSS_COLUMNS.index("log_var_q")
    table[:, log_var : log_var + 3] += table.new_tensor([-2.0, -3.5, -1.5])
    table[:, LOSS_COLUMNS.index("first")] = table.new_tensor([0.0, 1.0, 2.0, 0.0, 1.0])
    return table


def examples(n: int = 3, c: int = 3, h: int = 7, w: int = 11) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    wide_image = normal(n, c, h, w, seed=1).clamp(-1, 1)
    for dtype in DTYPES:
        out, both = normal(n, c, h, w, dtype=dtype), normal(n, 2 * c, h, w, dtype=dtype)
        given = dict(out=out, x_0=wide_image.to(dtype), seeds=example_seeds(n), step=one(0), table=_example_table())
        addressed = dict(step=steps(n) % 5, address=steps(n, 999), weights=uniform(n, seed=2))
        bound = dict(bound=True, stop_mean=False)
        for name, options in (
            (label(dtype), {}),
            (label(dtype, "weights", "address"), addressed),
            (label(dtype, "bound", "clip"), dict(step=steps(n) % 5, x_0=wide_image, bound=True, clip=True)),
            (label(dtype, "bound", "both"), addressed | bound | dict(out=both, learned_variance=True)),
            (label(dtype, "variance"), addressed | dict(out=both, learned_variance=True, bound=True)),
        ):
            arguments = given | options
            smooth = not options.get("bound") or "stop_mean" in options  # and no stopped gradient, which is no slope
            by = ("out",) if smooth else ()
            yield Example("diffusion_loss", name, arguments, ("out", "x_0"), by, tolerance=1e-5)
            backward = dict(address=None, weights=None, learned_variance=False, bound=False, stop_mean=True, clip=False)
            backward |= dict(grad_loss=normal(n, 2, seed=3) if "bound" in options else normal(n, seed=3)) | arguments
            yield Example("diffusion_loss_backward", name, backward, ("out", "x_0"))
