"""The reverse step: one step of any sampler, by a row of coefficients."""

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from types import NoneType

import numpy as np
import torch
from torch import Tensor

from .arguments import as_index, check_shape, check_types, look_up, wide
from .noise import composite as noise_composite
from .noise import horner
from .noise import reference as noise_reference
from .registration import by_torch_in_place, fake, native, refuse_gradient, run, same_device
from .seeds import Seeds, as_seeds
from .transforms import by_torch, mark_written

COLUMNS = ("p_x", "p_o", "k_x", "k_o", "k_0", "sigma", "log_var_min", "log_var_max", "t")
"""What a row of the coefficient table holds; a column for each of the history's tensors follows."""


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: int | Tensor,
    seeds: Seeds,
    *,
    out_uncond: Tensor | None = None,
    guidance: float = 1.0,
    clip: bool = False,
    learned_variance: bool = False,
    history: Sequence[Tensor] = (),
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of any sampler, by a row of coefficients (:mod:`diffkern.samplers`).

    ::

        o       = out_uncond + guidance (out - out_uncond), or out
        x0_hat  = p_x x + p_o o, clamped to [-1, 1] with ``clip``
        x_next  = k_x x + k_o o + k_0 x0_hat + sum_j k_j h_j + sigma z

    so that Algorithm 2 of Ho et al. 2020, ``(x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) + sigma_t z``,
    is the row with ``k_0 = 0``. z is ``noise(seeds, shape, step=t, stream=1)`` with the row's t, where sigma is not 0.

    x                 [N, ...]; [N, C, ...] with ``learned_variance``
    out               like x, the network's output; [N, 2C, ...] with ``learned_variance``
    table             float32 [steps, 9 + J]: the columns :data:`COLUMNS`, then k_j. Where sigma is not 0, t must lie in
                      [0, 2^32): the CPU raises otherwise, in the rows that are used; CUDA does not look
    step              the row: one, or an int64 tensor [N]. Out of range: raises on the CPU, gives NaN on CUDA
    seeds             int64 [N]
    out_uncond        like out: the output without its condition (Ho & Salimans 2022, eq. 6)
    learned_variance  out's second half interpolates the log-variance (Nichol & Dhariwal 2021, eq. 15)
    history           J tensors like x
    return_x0         also return x0_hat, like x
    """
    _check_step(x, out, table, out_uncond, guidance, clip, learned_variance, history)
    check_types("True or False", bool, return_x0=return_x0)
    step, seeds = as_index("step", step, x.device), as_seeds(seeds, x.device)
    if by_torch(x, out, table, out_uncond, history):
        return composite(
            x,
            out,
            table,
            step,
            seeds,
            out_uncond=out_uncond,
            guidance=guidance,
            clip=clip,
            learned_variance=learned_variance,
            history=history,
            return_x0=return_x0,
        )
    refuse_gradient(
        "reverse_step outside of diffkern.torch_ops()",
        x=x,
        out=out,
        table=table,
        out_uncond=out_uncond,
        history=history,
    )
    options = (out_uncond, guidance, clip, learned_variance, history)
    x_next, x0_hat = run(native.reverse_step, x, out, table, step, seeds, *options, return_x0)
    return (x_next, x0_hat) if return_x0 else x_next


def reverse_step_(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: int | Tensor,
    seeds: Seeds,
    *,
    out_uncond: Tensor | None = None,
    guidance: float = 1.0,
    clip: bool = False,
    learned_variance: bool = False,
    history: Sequence[Tensor] = (),
    x0_hat: Tensor | None = None,
) -> None:
    """:func:`reverse_step` in place: x becomes x_next, and ``x0_hat``, a tensor like x, receives the prediction.

    Each of the two may lie where an input does: x0_hat in the history's place, x in that of ``out``, or of its first
    half with ``learned_variance``. RuntimeError where they overlap otherwise.
    """
    _check_step(x, out, table, out_uncond, guidance, clip, learned_variance, history)
    check_types("a tensor or None", (Tensor, NoneType), x0_hat=x0_hat)
    tensors = dict(x=x, out=out, table=table, out_uncond=out_uncond, history=history, x0_hat=x0_hat)
    refuse_gradient("reverse_step_", **tensors)
    step, seeds = as_index("step", step, x.device), as_seeds(seeds, x.device)
    if not by_torch_in_place("reverse_step_", **tensors):
        options = (out_uncond, guidance, clip, learned_variance, history)
        run(native.reverse_step_, x, out, table, step, seeds, *options, x0_hat)
        mark_written(x, x0_hat)
        return
    options = dict(out_uncond=out_uncond, guidance=guidance, clip=clip, learned_variance=learned_variance)
    x_next, predicted = composite(x, out, table, step, seeds, **options, history=history, return_x0=True)
    x.copy_(x_next)
    if x0_hat is not None:
        x0_hat.copy_(predicted)


def _check_step(x, out, table, out_uncond, guidance, clip, learned_variance, history) -> None:
    """The types and values that the dispatcher would let pass, or whose names it would not say."""
    check_types("a tensor", Tensor, x=x, out=out, table=table)
    check_types("a tensor or None", (Tensor, NoneType), out_uncond=out_uncond)
    check_types("a number", Real, guidance=guidance)
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    check_types("True or False", bool, clip=clip, learned_variance=learned_variance)
    check_types("a list of tensors", (list, tuple), history=history)
    for h in history:
        check_types("tensors", Tensor, history=h)


@fake("reverse_step")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, return_x0):
    same_device(x, out=out, table=table, step=step, seeds=seeds, out_uncond=out_uncond)
    for h in history:
        same_device(x, history=h)
    return torch.empty_like(x), torch.empty_like(x) if return_x0 else x.new_empty(0)


@fake("reverse_step_")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x0_hat):
    same_device(x, out=out, table=table, step=step, seeds=seeds, out_uncond=out_uncond, x0_hat=x0_hat)
    for h in history:
        same_device(x, history=h)


# --- composite ---------------------------------------------------------------------------------------------------


def composite(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    *,
    out_uncond: Tensor | None = None,
    guidance: float = 1.0,
    clip: bool = False,
    learned_variance: bool = False,
    history: Sequence[Tensor] = (),
    return_x0: bool = False,
    noise: Callable[..., Tensor] = noise_composite,
    exp: Callable[[Tensor], Tensor] = torch.exp,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`diffkern.ops.reverse_step`."""
    n = x.shape[0]
    doubled = (n, 2 * x.shape[1], *x.shape[2:]) if learned_variance else tuple(x.shape)
    check_shape("out", out, doubled)
    check_shape("out_uncond", out_uncond, doubled)
    for h in history:
        check_shape("history", h, tuple(x.shape))
    check_shape("seeds", seeds, (n,))
    check_shape("table", table, (table.shape[0], len(COLUMNS) + len(history)))
    p_x, p_o, k_x, k_o, k_0, sigma, log_var_min, log_var_max, t, *k_h = look_up("step", step, table, x)

    def halves(out: Tensor) -> Sequence[Tensor]:
        return wide(out).chunk(2, 1) if learned_variance else (wide(out),)

    o, *second_half = halves(out)
    if out_uncond is not None:
        u = halves(out_uncond)[0]
        o = u + guidance * (o - u)
    x0 = p_x * wide(x) + p_o * o
    if clip:
        x0 = x0.clamp(-1, 1)
    x_next = k_x * wide(x) + k_o * o + k_0 * x0
    for k, h in zip(k_h, history, strict=True):
        x_next = x_next + k * wide(h)
    std = sigma
    if learned_variance:
        v = (second_half[0] + 1) * 0.5
        std = sigma * exp(0.5 * (log_var_min + v * (log_var_max - log_var_min)))
    z = noise(seeds, x.shape[1:], step=t.detach().flatten().long(), stream=1)
    x_next = torch.where(sigma == 0, x_next, x_next + std * z).to(x.dtype)
    return (x_next, x0.to(x.dtype)) if return_x0 else x_next


# --- reference ---------------------------------------------------------------------------------------------------


LOG2_E, LN_2_HIGH, LN_2_LOW = (np.float32(float.fromhex(h)) for h in ("0x1.715476p+0", "0x1.62e4p-1", "0x1.7f7d1cp-20"))
# (e^z - 1 - z) / z^2 on [-ln 2 / 2, ln 2 / 2]
EXP = [float.fromhex(h) for h in (
    "0x1.fffffcp-2", "0x1.555492p-3", "0x1.5558aap-5", "0x1.123978p-7", "0x1.6a5384p-10")]  # fmt: skip


def exp(x: np.ndarray) -> np.ndarray:
    """e^x: float32 -> float32; 0 below -87.7 and infinity above 88.4."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.where(x > np.float32(88.5), np.float32(88.5), x)
        x = np.where(x < np.float32(-88), np.float32(-88), x)
        t = x * LOG2_E + np.float32(1.5 * 2**23)  # a sum that is a whole number, held in the low bits
        n = t - np.float32(1.5 * 2**23)
        z = (x - n * LN_2_HIGH) - n * LN_2_LOW  # x = n ln 2 + z
        scale = ((t.view(np.int32) << 23) + np.int32(0x3F800000)).view(np.float32)
        return ((z * z) * horner(z, EXP) + z + np.float32(1)) * scale


def _exp(x: Tensor) -> Tensor:
    return torch.from_numpy(exp(x.cpu().numpy())).to(x.device)


reference = functools.partial(composite, noise=noise_reference, exp=_exp)
