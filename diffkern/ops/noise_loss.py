"""The training loss."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .arguments import as_index, check_shape, device_of, wide
from .example import DTYPES, Example, label, normal, one, steps, uniform
from .example import seeds as example_seeds
from .noise import composite as noise_composite
from .noise import reference as noise_reference
from .registration import BY_TORCH, Op, fake, gradient, native, refuse_gradient, same_device
from .seeds import Seeds, as_seeds
from .transforms import by_torch

op = Op("noise_loss")


def noise_loss(out: Tensor, seeds: Seeds, t: int | Tensor, weights: Tensor | None = None) -> Tensor:
    """loss_n = weight_n mean((out - eps)^2) (Ho et al. 2020, eq. 14), eps made again in the kernel instead of stored.

    out      [N, ...]: the network's prediction of eps
    seeds    int64 [N], t: one or int64 [N]: those that :func:`q_sample` made x_t with
    weights  float32 [N] or None: lambda_t; no gradient

    Returns float32 [N]. Differentiable in ``out``.
    """
    device = device_of(out)
    arguments = (out, as_seeds(seeds, device), as_index("t", t, device), weights)
    op.check(arguments)
    if by_torch(*arguments):
        return composite(*arguments)
    refuse_gradient("noise_loss", [("weights", weights)], BY_TORCH)
    return op(*arguments)


@fake("noise_loss", differentiable=True)
def _(out, seeds, t, weights):
    same_device(out, seeds=seeds, t=t, weights=weights)
    return out.new_empty(out.shape[0], dtype=torch.float32)


@fake("noise_loss_backward")
def _(grad_loss, out, seeds, t, weights):
    same_device(out, grad_loss=grad_loss, seeds=seeds, t=t, weights=weights)
    return torch.empty_like(out)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_loss):
    return native.noise_loss_backward(grad_loss.contiguous(), *ctx.saved_tensors), None, None, None


gradient("noise_loss", _backward, _save)

# --- composite and reference -------------------------------------------------------------------------------------


def composite(
    out: Tensor,
    seeds: Tensor,
    t: Tensor,
    weights: Tensor | None = None,
    *,
    noise: Callable[..., Tensor] = noise_composite,
) -> Tensor:
    """See :func:`diffkern.ops.noise_loss`. float64 of an ``out`` that is float64."""
    n = out.shape[0]
    check_shape("seeds", seeds, (n,))
    check_shape("weights", weights, (n,))
    eps = noise(seeds, out.shape[1:], step=t, stream=2)
    loss = (wide(out) - eps).square().unsqueeze(-1).flatten(1).mean(1)
    return loss if weights is None else loss * weights


reference = functools.partial(composite, noise=noise_reference)


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 3, c: int = 3, h: int = 7, w: int = 11) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    for dtype in DTYPES:
        given = dict(out=normal(n, c, h, w, dtype=dtype), seeds=example_seeds(n))
        plain, weighted = given | dict(t=one(0)), given | dict(t=steps(n, 499), weights=uniform(n))
        for name, arguments in ((label(dtype), plain), (label(dtype, "weights"), weighted)):
            yield Example("noise_loss", name, arguments, ("out",), ("out",), tolerance=1e-6)
            backward = dict(weights=None, grad_loss=normal(n, seed=1)) | arguments
            yield Example("noise_loss_backward", name, backward, ("out",))
