"""Group norm, SiLU, and what a residual block has around them."""

import math
from collections.abc import Iterator
from types import NoneType

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import check_shape, dense, wide
from .example import DTYPES, SUMS, Example, label, normal
from .registration import Op, fake, gradient, native, same_device
from .transforms import by_torch

op = Op("group_norm_silu")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    scale_shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(group_norm(x + add) (1 + scale) + shift) + residual (Wu & He 2018), in one pass. Differentiable.

    x             [N, C, ...]; fast where it is contiguous or channels_last, and the result is like it
    weight, bias  [C]
    groups        a divisor of C
    scale_shift   [N, 2C], scale before shift (Dhariwal & Nichol 2021, section 3)
    add           [N, C]: to every pixel, before the norm (the time embedding of Ho et al. 2020, appendix B)
    residual      like x: to the result
    silu          without, the argument of silu is what is returned

    Statistics and arithmetic are float32 or better, also where the mean is far from 0. A sample's bits depend neither
    on its batch nor on the number of threads.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    for name, tensor in (("scale_shift", scale_shift), ("add", add), ("residual", residual)):
        if not isinstance(tensor, (Tensor, NoneType)):
            raise TypeError(f"{name}: expected a tensor or None, got {type(tensor).__name__}")
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise TypeError(f"groups: expected an int, got {groups!r}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {eps!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
    if by_torch(x, weight, bias, scale_shift, add, residual):
        return composite(
            x, weight, bias, groups, eps=eps, scale_shift=scale_shift, add=add, residual=residual, silu=silu
        )
    weight, bias = dense("weight", weight, torch.float32), dense("bias", bias, torch.float32)
    scale_shift, add = dense("scale_shift", scale_shift, torch.float32), dense("add", add, torch.float32)
    y, _, _ = op(x, weight, bias, groups, eps, scale_shift, add, residual, silu)
    return y


def _empty_like_dense(x: Tensor) -> Tensor:
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@fake("group_norm_silu", differentiable=True)
def _(x, weight, bias, groups, eps, scale_shift, add, residual, silu):
    same_device(x, weight=weight, bias=bias, scale_shift=scale_shift, add=add, residual=residual)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return _empty_like_dense(x), mean, rstd


@fake("group_norm_silu_out")
def _(y, x, skip, weight, bias, groups, eps, scale_shift, silu):
    same_device(y, x=x, skip=skip, weight=weight, bias=bias, scale_shift=scale_shift)


@fake("group_norm_silu_backward")
def _(grad_y, x, mean, rstd, weight, bias, groups, scale_shift, add, silu):
    factors = dict(mean=mean, rstd=rstd, weight=weight, bias=bias, scale_shift=scale_shift, add=add)
    same_device(x, grad_y=grad_y, **factors)
    grad_offset, grad_slope = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return _empty_like_dense(x), grad_offset, grad_slope


def _save(ctx, inputs, output):
    x, weight, bias, ctx.groups, _, scale_shift, add, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale_shift, add)


def _backward(ctx, grad_y, *_):
    x, mean, rstd, weight, bias, scale_shift, add = ctx.saved_tensors
    grad_x, grad_offset, grad_slope = native.group_norm_silu_backward(
        grad_y, x, mean, rstd, weight, bias, ctx.groups, scale_shift, add, ctx.silu
    )
    # offset = bias (1 + scale) + shift and slope = weight (1 + scale), of each sample and channel
    grad_weight, grad_bias, grad_scale_shift, grad_add = grad_slope, grad_offset, None, None
    if scale_shift is not None:
        one_plus_scale = 1 + scale_shift.chunk(2, dim=1)[0]
        grad_weight, grad_bias = grad_slope * one_plus_scale, grad_offset * one_plus_scale
        grad_scale_shift = torch.cat((grad_slope * weight + grad_offset * bias, grad_offset), dim=1)
    if add is not None:
        grad_add = grad_x.unsqueeze(-1).sum(tuple(range(2, x.ndim + 1)), dtype=torch.float32)
    grad_residual = grad_y if ctx.needs_input_grad[7] else None
    return grad_x, grad_weight.sum(0), grad_bias.sum(0), None, None, grad_scale_shift, grad_add, grad_residual, None


gradient("group_norm_silu", _backward, _save)

# --- composite and reference -------------------------------------------------------------------------------------


def composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    scale_shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """See :func:`diffkern.ops.group_norm_silu`.

    Torch's own norm would not do: its forward-mode derivative takes no channels_last image.
    """
    n, c = x.shape[:2]
    if groups < 1 or c % groups:
        raise RuntimeError(f"groups: expected a divisor of the {c} channels, got {groups}")
    y, pixel = wide(x), [1] * (x.ndim - 2)
    check_shape("weight", weight, (c,))
    check_shape("bias", bias, (c,))
    check_shape("scale_shift", scale_shift, (n, 2 * c))
    check_shape("add", add, (n, c))
    check_shape("residual", residual, tuple(x.shape))
    if add is not None:
        y = y + add.to(y.dtype).reshape(n, c, *pixel)
    slabs = y.reshape(n, groups, math.prod(x.shape[1:]) // groups)
    centered = slabs - slabs.mean(2, keepdim=True)
    y = (centered * (centered.square().mean(2, keepdim=True) + eps).rsqrt()).reshape(x.shape)
    y = y * weight.to(y.dtype).reshape(c, *pixel) + bias.to(y.dtype).reshape(c, *pixel)
    if scale_shift is not None:
        scale, shift = scale_shift.to(y.dtype).reshape(n, 2 * c, *pixel).chunk(2, dim=1)
        y = y * (1 + scale) + shift
    if silu:
        y = F.silu(y)
    return (y if residual is None else y + residual).to(x.dtype)


reference = composite


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 2, c: int = 32, h: int = 5, w: int = 7) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    groups = max(c // 8, 1)
    norm = dict(weight=normal(c, seed=1), bias=normal(c, seed=2), groups=groups)
    both = dict(scale_shift=normal(n, 2 * c, seed=3))
    options = {(): {}, ("without silu",): dict(silu=False)}
    for dtype in DTYPES:
        x, residual, grad_y = (normal(n, c, h, w, dtype=dtype, seed=seed) for seed in (4, 5, 6))
        options["every option",] = both | dict(add=normal(n, c, seed=7), residual=residual, eps=1e-2)
        for names, chosen in options.items():
            given = norm | dict(x=x) | chosen
            differentiable = ("x", "weight", "bias", "scale_shift", "add", "residual")
            images, name = ("x", "residual"), label(dtype, *names)
            yield Example("group_norm_silu", name, given, images, differentiable, SUMS[dtype])
            statistics = dict(mean=normal(n, groups, seed=8), rstd=normal(n, groups, seed=9).abs())
            backward = dict(scale_shift=None, add=None, silu=True) | given | statistics | dict(grad_y=grad_y)
            yield Example("group_norm_silu_backward", name, backward, ("x", "grad_y"), tolerance=SUMS[dtype])
    given = norm | both | dict(eps=1e-5, silu=True)
    images = dict(y=normal(n, c, h, w, last=True), x=normal(n, c, h, w, seed=4, last=True), skip=None)
    yield Example("group_norm_silu_out", "one image", given | images)
    parts = dict(x=normal(n, c // 3, h, w, seed=4, last=True), skip=normal(n, c - c // 3, h, w, seed=5, last=True))
    yield Example("group_norm_silu_out", "two images", given | images | parts)
    for terms in (1, 2, 3):
        blocked = torch.zeros(n, c // 32, terms, h + 2, w + 2, 32, dtype=torch.bfloat16, device="cpu")
        yield Example("group_norm_silu_out", f"{terms} terms", given | images | dict(y=blocked))
