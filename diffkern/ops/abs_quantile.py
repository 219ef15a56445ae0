"""A quantile of each sample's predicted magnitudes: the threshold of dynamic thresholding."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import as_index, device_of, wide
from .example import Example
from .registration import Op, fake, same_device
from .reverse_step import examples as reverse_step_examples
from .reverse_step import outputs, unclamped_x0
from .row import read_rows
from .transforms import by_torch

op = Op("abs_quantile")


def abs_quantile(
    x: Tensor,
    out: Tensor | None,
    table: Tensor,
    step: int | Tensor,
    q: float,
    *,
    out_uncond: Tensor | None = None,
    guidance: float = 1.0,
    grad: Tensor | None = None,
    learned_variance: bool = False,
) -> Tensor:
    """The q-quantile of each sample's abs(x0_hat), x0_hat before it is clamped (Saharia et al. 2022): float32 [N].

    It is ``torch.quantile``'s: linear between the two nearest elements, and NaN where one is NaN. Dynamic thresholding
    takes S, the result or 1, whichever is larger: x0_hat / S clamped to [-1, 1] is the x0_hat of a row with p_x / S,
    p_o / S and p_g / S.

    q  in [0, 1]

    The other arguments are those of :func:`reverse_step`; the rows may have any slots of history.
    """
    step = as_index("step", step, device_of(x))
    arguments = (x, out, table, step, q, out_uncond, guidance, grad, learned_variance)
    op.check(arguments)
    if not 0 <= q <= 1:
        raise ValueError(f"q: expected a number in [0, 1], got {q}")
    if by_torch(*arguments):
        return composite(*arguments)
    return op(*arguments)


@fake("abs_quantile")
def _(x, out, table, step, q, out_uncond=None, guidance=1.0, grad=None, learned_variance=False):
    same_device(x, out=out, table=table, step=step, out_uncond=out_uncond, grad=grad)
    return x.new_empty(x.shape[0], dtype=torch.float32)


# --- composite and reference -------------------------------------------------------------------------------------


def composite(
    x: Tensor,
    out: Tensor | None,
    table: Tensor,
    step: Tensor,
    q: float,
    out_uncond: Tensor | None = None,
    guidance: float = 1.0,
    grad: Tensor | None = None,
    learned_variance: bool = False,
) -> Tensor:
    """See :func:`diffkern.ops.abs_quantile`."""
    row, x = read_rows(step, table, x, False, guidance), wide(x)
    o, *_ = outputs(row, x, out, out_uncond, learned_variance)
    magnitudes = unclamped_x0(row, x, o, None if grad is None else wide(grad)).abs().unsqueeze(-1).flatten(1)
    ordered = magnitudes.sort(1).values.double()
    rank = q * (ordered.shape[1] - 1)
    lower, upper, weight = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)], rank - math.floor(rank)
    quantile = torch.where(lower == upper, lower, lower + weight * (upper - lower))
    return torch.where(ordered[:, -1].isnan(), torch.nan, quantile).to(magnitudes.dtype)


reference = composite

# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 3, c: int = 3, h: int = 7, w: int = 11) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`. Those of reverse_step with another prediction."""
    names = ("x", "out", "table", "step", "out_uncond", "guidance", "grad", "learned_variance")
    for example in reverse_step_examples(n, c, h, w):
        if example.op == "reverse_step" and not example.name.endswith("clip"):
            given = {name: value for name, value in example.arguments.items() if name in names}
            yield Example("abs_quantile", example.name, given | dict(q=0.7), example.images, tolerance=1e-6)
