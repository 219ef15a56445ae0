"""Forward noising."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .arguments import as_index, check_shape, device_of, look_up, wide
from .example import DTYPES, Example, label, normal, one, steps, uniform
from .example import seeds as example_seeds
from .noise import composite as noise_composite
from .noise import reference as noise_reference
from .registration import Op, fake, same_device
from .seeds import Seeds, as_seeds
from .transforms import by_torch

op, op_ = Op("q_sample"), Op("q_sample_")


def q_sample(
    x_0: Tensor,
    t: int | Tensor,
    seeds: Seeds,
    table: Tensor,
    *,
    address: int | Tensor | None = None,
    return_eps: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4), eps made in the kernel.

    x_0         [N, ...]
    t           0-based time steps: one, or an int64 tensor [N]
    seeds       int64 [N]: eps is ``noise(seeds, shape, step=address, stream=2)``
    table       float32 [T, 2], sqrt(alpha_bar) and sqrt(1 - alpha_bar): ``Schedule.q_table``
    address     the noise's step, in [0, 2^32): one, or an int64 tensor [N]; None is t
    return_eps  also return eps, like x_0
    """
    arguments = _arguments(x_0, t, seeds, table, address) + (return_eps,)
    op.check(arguments)
    if by_torch(*arguments):
        return composite(*arguments)
    x_t, eps = op(*arguments)
    return (x_t, eps) if return_eps else x_t


def q_sample_(
    x_0: Tensor, t: int | Tensor, seeds: Seeds, table: Tensor, *, address: int | Tensor | None = None
) -> None:
    """:func:`q_sample` in place: x_0 becomes x_t."""
    arguments = _arguments(x_0, t, seeds, table, address)
    op_.check(arguments)
    if op_.by_torch_in_place(arguments):
        x_0.copy_(composite(*arguments))
    else:
        op_(*arguments)


def _arguments(x_0: Tensor, t: int | Tensor, seeds: Seeds, table: Tensor, address: int | Tensor | None) -> tuple:
    device = device_of(x_0)
    t, seeds = as_index("t", t, device), as_seeds(seeds, device)
    return x_0, t, seeds, table, None if address is None else as_index("address", address, device)


@fake("q_sample")
def _(x_0, t, seeds, table, address, return_eps):
    same_device(x_0, t=t, seeds=seeds, table=table, address=address)
    return torch.empty_like(x_0), torch.empty_like(x_0) if return_eps else x_0.new_empty(0)


@fake("q_sample_")
def _(x_0, t, seeds, table, address):
    same_device(x_0, t=t, seeds=seeds, table=table, address=address)


# --- composite and reference -------------------------------------------------------------------------------------


def composite(
    x_0: Tensor,
    t: Tensor,
    seeds: Tensor,
    table: Tensor,
    address: Tensor | None = None,
    return_eps: bool = False,
    *,
    noise: Callable[..., Tensor] = noise_composite,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`diffkern.ops.q_sample`."""
    check_shape("seeds", seeds, (x_0.shape[0],))
    a, s = look_up("t", t, table, x_0)
    eps = noise(seeds, x_0.shape[1:], step=t if address is None else address, stream=2)
    x_t = (a * wide(x_0) + s * eps).to(x_0.dtype)
    return (x_t, eps.to(x_0.dtype)) if return_eps else x_t


reference = functools.partial(composite, noise=noise_reference)


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 3, c: int = 3, h: int = 7, w: int = 11) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    for dtype in DTYPES:

        def call(op: str, *options: str, dtype: torch.dtype = dtype, **arguments: object) -> Example:
            given = dict(x_0=normal(n, c, h, w, dtype=dtype), t=one(0), seeds=example_seeds(n), table=uniform(10, 2))
            differentiable = () if op.endswith("_") or options else ("x_0",)
            return Example(op, label(dtype, *options), given | arguments, ("x_0",), differentiable)

        yield call("q_sample")
        yield call("q_sample", "eps", t=steps(n, 3) % 10, return_eps=True)
        yield call("q_sample", "address", t=steps(n, 3) % 10, address=steps(n, 1000))
        yield call("q_sample_")
