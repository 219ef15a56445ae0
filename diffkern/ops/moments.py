"""Sums over each sample of two tensors and of their products: means, deviations, norms and angles follow from them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import check_shape, wide
from .example import DTYPES, Example, label, normal
from .registration import Op, fake, same_device
from .transforms import by_torch

op = Op("moments")


def moments(a: Tensor, b: Tensor) -> Tensor:
    """The sums of a, b, a^2, a b and b^2 over each sample, in one pass: float64 [N, 5].

    a, b  [N, ...] of one shape and dtype, with at least one element a sample

    A sample's bits depend neither on its batch nor on the number of threads.
    """
    op.check((a, b))
    if by_torch(a, b):
        return composite(a, b)
    return op(a, b)


@fake("moments")
def _(a, b):
    same_device(a, b=b)
    return a.new_empty((a.shape[0], 5), dtype=torch.float64)


# --- composite and reference -------------------------------------------------------------------------------------


def composite(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`diffkern.ops.moments`."""
    check_shape("b", b, tuple(a.shape))
    a, b = (wide(tensor).double().unsqueeze(-1).flatten(1) for tensor in (a, b))
    return torch.stack([product.sum(1) for product in (a, b, a * a, a * b, b * b)], 1)


reference = composite

# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 3, c: int = 3, h: int = 7, w: int = 11) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    for dtype in DTYPES:
        images = dict(a=normal(n, c, h, w, dtype=dtype, seed=1), b=normal(n, c, h, w, dtype=dtype, seed=2))
        yield Example("moments", label(dtype), images, ("a", "b"), ("a", "b"), tolerance=1e-4)
