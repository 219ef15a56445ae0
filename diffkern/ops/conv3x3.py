"""The convolution of training, whose weight changes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import check_shape, dense
from .example import Example, normal
from .flops import Shape, convolution, formula
from .registration import Op, fake, gradient, native, same_device
from .transforms import by_torch

op = Op("conv3x3")


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3x3 convolution of stride 1 and padding 1 by a weight that changes: for training on a CPU. Differentiable.

    x       [N, C, H, W], float32; fast where it is channels_last
    weight  [K, C, 3, 3], float32; fast where it is channels_last
    bias    [K] or None

    Returns [N, K, H, W], channels_last. By Winograd's F(4x4, 3x3) (Lavin & Gray 2016). The input gradient is the same
    convolution by the turned weight, the weight gradient is the algorithm's adjoint,
    dg = G^T (sum (A dy A^T) . (B^T d B)) G. A sample's bits, and those of its gradient, depend neither on its batch nor
    on the number of threads; the bits of the weight's gradient do not depend on the latter.
    """
    op.check((x, weight, bias))
    if by_torch(x, weight, bias):
        return composite(x, weight, bias)
    return op(x, weight, dense("bias", bias))


def _empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@fake("conv3x3", differentiable=True)
def _(x, weight, bias):
    same_device(x, weight=weight, bias=bias)
    return _empty_channels_last(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


@fake("conv3x3_backward")
def _(grad_y, x, weight, of_x, of_weight):
    same_device(x, grad_y=grad_y, weight=weight)
    return tuple(
        _empty_channels_last(tensor, tensor.shape) if wanted else x.new_empty(0)
        for tensor, wanted in ((x, of_x), (weight, of_weight))
    )


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad_y):
    of_x, of_weight, of_bias = ctx.needs_input_grad
    grad_x, grad_weight = native.conv3x3_backward(grad_y, *ctx.saved_tensors, of_x, of_weight)
    grad_bias = grad_y.sum((0, 2, 3)) if of_bias else None
    return grad_x if of_x else None, grad_weight if of_weight else None, grad_bias


gradient("conv3x3", _backward, _save)


@formula("conv3x3")
def _(x: Shape, weight: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return convolution(out_shape, x[1], 9)


@formula("conv3x3_backward")
def _(grad_y: Shape, x: Shape, weight: Shape, of_x: bool, of_weight: bool, **kwargs: Any) -> int:
    return (of_x + of_weight) * convolution(grad_y, x[1], 9)


# --- composite and reference -------------------------------------------------------------------------------------


def composite(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`diffkern.ops.conv3x3`."""
    check_shape("weight", weight, (weight.shape[0], x.shape[1], 3, 3))
    return F.conv2d(x, weight, bias, padding=1)


reference = composite


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 2, c: int = 6, k: int = 9, h: int = 4, w: int = 5) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    given = dict(x=normal(n, c, h, w, seed=1), weight=normal(k, c, 3, 3, seed=2))
    for name, options in (("plain", dict(bias=None)), ("bias", dict(bias=normal(k, seed=3)))):
        differentiable = ("x", "weight", "bias")
        yield Example("conv3x3", name, given | options, ("x", "weight"), differentiable, tolerance=1e-4)
    for of_x, of_weight in ((True, True), (True, False), (False, True)):
        backward = given | dict(grad_y=normal(n, k, h, w, seed=4), of_x=of_x, of_weight=of_weight)
        yield Example("conv3x3_backward", f"{of_x}, {of_weight}", backward, ("x", "weight", "grad_y"))
