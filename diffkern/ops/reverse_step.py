"""The reverse step: one step of any sampler, by a row of coefficients."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from .arguments import as_index, check_shape, check_types, device_of, wide
from .example import DTYPES, Example, label, normal, one, steps, uniform
from .example import seeds as example_seeds
from .noise import composite as noise_composite
from .noise import horner
from .noise import reference as noise_reference
from .registration import Op, fake, same_device
from .row import COLUMNS, LONG_COLUMNS, MAX_HISTORY, addresses, has_long_rows, long_columns, read_rows
from .seeds import Seeds, as_seeds
from .transforms import by_torch, readable

op, op_ = Op("reverse_step"), Op("reverse_step_")


def reverse_step(
    x: Tensor,
    out: Tensor | None,
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
    address: Tensor | None = None,
    grad: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of any sampler, by a row of coefficients (:mod:`diffkern.samplers`).

    ::

        o       = out_uncond + w (out - out_uncond), or out
        x0_hat  = p_x x + p_o o + p_g grad, clamped to [-limit, limit]
        kept    = q_x x + q_o o + q_0 x0_hat
        x_next  = k_x x + k_o o + k_0 x0_hat + sum_j k_j h_j + k_u out_uncond + k_g var grad + std z
        x_next  = mask x_next + (1 - mask) (b_0 known + b_z z')

    so that Algorithm 2 of Ho et al. 2020, ``(x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) + sigma_t z``,
    is the row with ``k_0 = 0``. std is sigma, and sigma exp(log_var / 2) with ``learned_variance``; var is std^2 with
    ``learned_variance`` and 1 without, where k_g has the variance in it.

    The length of its rows says which kind a table has.

    A *long* row has the columns :data:`LONG_COLUMNS`, then k_j for each slot of the history, and zeros up to a multiple
    of 4 (:func:`long_columns`). A coefficient of 0 leaves its term out and its operand unread, but for p_x, p_o, k_x,
    k_o and k_0. A row with b_0 = b_z = 0 does not blend. z is the sum of ``noise(seeds, shape, step=address - i,
    stream=1)`` over i = 0, ..., count - 1, and z' is ``noise(seeds, shape, step=address, stream=6)``.

    A *short* row has the columns :data:`COLUMNS`, then k_j for each tensor of the history. Its w is ``guidance``. Its
    limit is 1 with ``clip`` and infinite without. It keeps x0_hat, and z is ``noise(seeds, shape, step=t, stream=1)``.

    Noise is drawn where sigma, or b_z, is not 0. There the address, or t, must lie in [0, 2^32), and the count in
    [1, address + 1]. Otherwise the CPU raises, for the rows that are used. CUDA does not look at t, and gives NaN for
    long rows.

    x                 [N, ...]; [N, C, ...] with ``learned_variance``
    out               like x, the network's output; [N, 2C, ...] with ``learned_variance``. None for a long row without
                      a call: o is then 0, and so are p_o, k_o and q_o
    table             float32 [steps, columns]; long rows begin at a multiple of 16 bytes
    step              the row: one, or an int64 tensor [N]. Out of range: raises on the CPU, gives NaN on CUDA
    seeds             int64 [N]
    out_uncond        like out: the output without its condition (Ho & Salimans 2022, eq. 6)
    guidance, clip    for short rows
    learned_variance  out's second half interpolates the log-variance (Nichol & Dhariwal 2021, eq. 15)
    history           up to 6 tensors like x
    return_x0         also return x0_hat, like x: for short rows
    address           int64 [steps, 2], address and count of each row: for long rows that draw noise

    For long rows alone:

    grad              like x: the gradient of ln p(condition | x) (Dhariwal & Nichol 2021), or another that guides
    known, mask       the image that x_next is blended with at its noise level, like x, and 1 where x_next stays. The
                      mask has x's dtype, and in each dimension x's size or 1
    return_kept       also return what is kept, like x
    """
    check_types("True or False", bool, return_x0=return_x0, return_kept=return_kept)
    both, device = return_x0 or return_kept, device_of(x)
    step, seeds = as_index("step", step, device), as_seeds(seeds, device)
    options = (out_uncond, guidance, clip, learned_variance, history, both, address, grad, known, mask)
    arguments = (x, out, table, step, seeds, *options)
    op.check(arguments)
    _check_values(out, table, guidance, clip)
    if return_x0 and has_long_rows(table):
        raise ValueError("return_x0: expected False with long rows, which have return_kept, got True")
    if return_kept and not has_long_rows(table):
        raise ValueError("return_kept: expected False with short rows, which have return_x0, got True")
    if by_torch(*arguments):
        return composite(*arguments)
    x_next, kept = op(*arguments)
    return (x_next, kept) if both else x_next


def reverse_step_(
    x: Tensor,
    out: Tensor | None,
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
    address: Tensor | None = None,
    grad: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """:func:`reverse_step` in place: x becomes x_next, and a tensor like x receives the second result.

    That is ``x0_hat`` for short rows, and ``kept`` for long ones. Each of the two tensors may lie where an input does,
    but not where ``known`` or ``mask`` does: kept in the place of the history, x in that of ``out``, or of its first
    half with ``learned_variance``. RuntimeError where they overlap otherwise.
    """
    device = device_of(x)
    step, seeds = as_index("step", step, device), as_seeds(seeds, device)
    read = (x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history)
    arguments = (*read, x0_hat, address, grad, known, mask, kept)
    op_.check(arguments)
    _check_values(out, table, guidance, clip)
    if not op_.by_torch_in_place(arguments):
        op_(*arguments)
        return
    target = _second_target(x, table, x0_hat, kept)
    x_next, second = composite(*read, True, address, grad, known, mask)
    x.copy_(x_next)
    if target is not None:
        target.copy_(second)


def _check_values(out: Tensor | None, table: Tensor, guidance: float, clip: bool) -> None:
    """The values that only rows of one kind take. The defaults, which the two share, cost no look at the table."""
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    if out is not None and guidance == 1 and not clip:
        return
    if not has_long_rows(table):
        check_types("a tensor", Tensor, out=out)
    elif guidance != 1:
        raise ValueError(f"guidance: expected 1 with long rows, which have w, got {guidance}")
    elif clip:
        raise ValueError("clip: expected False with long rows, which have a limit, got True")


def _second_target(x: Tensor, table: Tensor, x0_hat: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """Return the tensor for the second result, or None, checked as the kernel's binding does."""
    targets = dict(x0_hat=x0_hat, kept=kept)
    rows, name, other = ("long", "kept", "x0_hat") if has_long_rows(table) else ("short", "x0_hat", "kept")
    if targets[other] is not None:
        raise RuntimeError(f"{other}: expected None with {rows} rows, which have {name}, got a tensor")
    target = targets[name]
    check_shape(name, target, tuple(x.shape))
    if target is not None and target.dtype != x.dtype:
        expected, got = (str(tensor.dtype).removeprefix("torch.") for tensor in (x, target))
        raise RuntimeError(f"{name}: expected {expected}, got {got}")
    return target


@fake("reverse_step")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, return_x0, *operands):
    same_device(x, out=out, table=table, step=step, seeds=seeds, out_uncond=out_uncond)
    same_device(x, **dict(zip(("address", "grad", "known", "mask"), operands, strict=False)))
    for h in history:
        same_device(x, history=h)
    return torch.empty_like(x), torch.empty_like(x) if return_x0 else x.new_empty(0)


@fake("reverse_step_")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x0_hat, *operands):
    same_device(x, out=out, table=table, step=step, seeds=seeds, out_uncond=out_uncond, x0_hat=x0_hat)
    same_device(x, **dict(zip(("address", "grad", "known", "mask", "kept"), operands, strict=False)))
    for h in history:
        same_device(x, history=h)


# --- composite ---------------------------------------------------------------------------------------------------


def _plus(total: Tensor, k: Tensor, value: Tensor) -> Tensor:
    """total + k value. Where k is 0 it is the total, whatever the value: it may be memory that nobody wrote."""
    return torch.where(k == 0, total, total + k * value)


def outputs(
    row: SimpleNamespace, x: Tensor, out: Tensor | None, out_uncond: Tensor | None, learned_variance: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(o, out_uncond, the second half of out), the last two where they are there. Without out, o and its row are 0."""
    if out is None:
        row.p_o = row.k_o = row.q_o = row.p_x.new_zeros(())
        return torch.zeros_like(x), None, None
    o, *second_half = wide(out).chunk(2, 1) if learned_variance else (wide(out),)
    u = None
    if out_uncond is not None:
        u = wide(out_uncond).chunk(2, 1)[0] if learned_variance else wide(out_uncond)
        o = u + row.w * (o - u)
    return o, u, *(second_half or [None])


def unclamped_x0(row: SimpleNamespace, x: Tensor, o: Tensor, grad: Tensor | None) -> Tensor:
    x0 = row.p_x * x + row.p_o * o
    return x0 if grad is None else _plus(x0, row.p_g, grad)


def _summed_noise(
    noise: Callable[..., Tensor], seeds: Tensor, x: Tensor, address: Tensor, count: Tensor, most: int, stream: int
) -> Tensor:
    """z(address) + z(address - 1) + ... of ``count`` terms, and of no more than ``most``; NaN of none."""
    count = count.reshape(-1, *[1] * (x.ndim - 1))
    z = noise(seeds, x.shape[1:], step=address, stream=stream)
    for i in range(1, most):
        term = noise(seeds, x.shape[1:], step=(address - i).clamp(min=0), stream=stream)
        z = torch.where(count > i, z + term, z)
    return torch.where(count > 0, z, torch.nan)


def _check_operands(x, out, table, out_uncond, learned_variance, history, address, grad, known, mask) -> None:
    """Which ones go with which rows, and their shapes: as csrc/bindings/reverse_step.cpp."""
    shape, is_long = tuple(x.shape), has_long_rows(table)
    doubled = (shape[0], 2 * shape[1], *shape[2:]) if learned_variance else shape
    for name, tensor in dict(address=address, grad=grad, known=known, mask=mask).items():
        if tensor is not None and not is_long:
            raise RuntimeError(f"{name}: expected None with short rows, got a tensor")
    if out is None and out_uncond is not None:
        raise RuntimeError("out_uncond: expected None without out, got a tensor")
    if out is None and learned_variance:
        raise RuntimeError("learned_variance: expected False without out, got True")
    for name, tensor, other, beside in (("known", known, "mask", mask), ("mask", mask, "known", known)):
        if tensor is None and beside is not None:
            raise RuntimeError(f"{name}: expected a tensor with {other}, got None")
    for name, tensor in (("out", out), ("out_uncond", out_uncond)):
        check_shape(name, tensor, doubled)
    for name, tensor in (("grad", grad), ("known", known), *(("history", h) for h in history)):
        check_shape(name, tensor, shape)
    if mask is not None and not (mask.ndim == x.ndim and all(mask.shape[d] in (1, shape[d]) for d in range(x.ndim))):
        raise RuntimeError(f"mask: expected shape {shape} or 1 in place of any size, got {tuple(mask.shape)}")
    if len(history) > MAX_HISTORY:
        raise RuntimeError(f"history: expected at most {MAX_HISTORY} tensors, got {len(history)}")
    columns = long_columns(len(history)) if is_long else len(COLUMNS) + len(history)
    most = long_columns(MAX_HISTORY) if is_long else columns
    check_shape("table", table, *((table.shape[0], width) for width in range(columns, most + 1, 4)))
    check_shape("address", address, (table.shape[0], 2))
    if address is not None and address.dtype != torch.int64:
        raise RuntimeError(f"address: expected int64, got {str(address.dtype).removeprefix('torch.')}")


def composite(
    x: Tensor,
    out: Tensor | None,
    table: Tensor,
    step: Tensor,
    seeds: Tensor,
    out_uncond: Tensor | None = None,
    guidance: float = 1.0,
    clip: bool = False,
    learned_variance: bool = False,
    history: Sequence[Tensor] = (),
    return_x0: bool = False,
    address: Tensor | None = None,
    grad: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    return_kept: bool = False,
    noise: Callable[..., Tensor] = noise_composite,
    exp: Callable[[Tensor], Tensor] = torch.exp,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`diffkern.ops.reverse_step`."""
    _check_operands(x, out, table, out_uncond, learned_variance, history, address, grad, known, mask)
    check_shape("seeds", seeds, (x.shape[0],))
    row = read_rows(step, table, x, clip, guidance)
    if mask is None:
        row.b_0 = row.b_z = table.new_zeros(())
    first, count = addresses(row, step, address, x)
    dtype, x = x.dtype, wide(x)

    o, u, second_half = outputs(row, x, out, out_uncond, learned_variance)
    g = None if grad is None else wide(grad)
    x0 = unclamped_x0(row, x, o, g)
    x0 = x0.clamp(-row.limit, row.limit)
    x_next = row.k_x * x + row.k_o * o + row.k_0 * x0
    for k, h in zip(row.k_j, history, strict=False):
        x_next = _plus(x_next, k, wide(h)) if has_long_rows(table) else x_next + k * wide(h)
    if u is not None:
        x_next = _plus(x_next, row.k_u, u)
    std = row.sigma
    if learned_variance:
        v = (second_half + 1) * 0.5
        std = row.sigma * exp(0.5 * (row.log_var_min + v * (row.log_var_max - row.log_var_min)))
    if g is not None:
        k_g = torch.where(row.sigma == 0, 0, row.k_g) if learned_variance else row.k_g
        shift = k_g * (std * std) if learned_variance else k_g
        x_next = torch.where(k_g == 0, x_next, x_next + shift * g)
    most = 1
    if address is not None:  # in a transform the samples' own counts are not to be read
        most = max([1, *count.tolist()]) if readable(count) else int(address[:, 1].max())
    z = _summed_noise(noise, seeds, x, first, count, most, stream=1)
    x_next = torch.where(row.sigma == 0, x_next, x_next + std * z)
    if mask is not None:
        z = _summed_noise(noise, seeds, x, first, count, 1, stream=6)
        noisy, m = _plus(row.b_0 * wide(known), row.b_z, z), wide(mask)
        x_next = torch.where((row.b_0 == 0) & (row.b_z == 0), x_next, m * x_next + (1 - m) * noisy)
    if not (return_x0 or return_kept):
        return x_next.to(dtype)
    kept = row.q_0 * x0
    kept = torch.where((row.q_x == 0) & (row.q_o == 0), kept, row.q_x * x + row.q_o * o + kept)
    return x_next.to(dtype), kept.to(dtype)


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

# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 3, c: int = 3, h: int = 7, w: int = 11) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    images = ("x", "out", "out_uncond", "history", "x0_hat", "kept", "grad", "known", "mask")
    differentiable = ("x", "out", "out_uncond", "history", "grad", "known")
    for dtype in DTYPES:

        def image(seed: int, channels: int = c, dtype: torch.dtype = dtype) -> Tensor:
            return normal(n, channels, h, w, dtype=dtype, seed=seed)

        def call(op: str, name: str, count: int, smooth: bool = False, **options: object) -> Example:
            given = dict(x=image(1), out=image(2), table=_example_table(count), step=one(0), seeds=example_seeds(n))
            given |= dict(history=[image(4 + j) for j in range(count)]) | options
            return Example(op, name, given, images, differentiable if smooth else ())

        twice = dict(out=image(2, 2 * c), learned_variance=True)
        guided, guided_twice = (dict(out_uncond=image(3, channels), guidance=2.5) for channels in (c, 2 * c))
        rest = dict(step=steps(n) % 5, clip=True, return_x0=True)
        if dtype == torch.float32:
            yield call("reverse_step", label(dtype), 0)
            yield call("reverse_step_", label(dtype), 0)
            yield call("reverse_step", label(dtype, "every option but clip"), 1, True, **twice, **guided_twice)
        yield call("reverse_step", label(dtype, "clip"), 2, **rest)
        yield call("reverse_step", label(dtype, "guidance, clip"), 2, **rest, **guided)
        yield call("reverse_step", label(dtype, "learned variance, clip"), 2, **rest, **twice)
        yield call("reverse_step", label(dtype, "every option"), 2, **rest, **twice, **guided_twice)
        options = dict(x0_hat=image(6), clip=True) | twice | guided_twice
        yield call("reverse_step_", label(dtype, "every option"), 2, **options)

        table, address = _example_long_table()
        mask = uniform(1, 1, h, w, seed=9).to(dtype)
        long = twice | dict(table=table, address=address, grad=image(7), known=image(8), mask=mask)
        long |= dict(out_uncond=image(3, 2 * c))
        if dtype == torch.float32:
            yield call("reverse_step", label(dtype, "long rows, all smooth"), 2, True, **long)
        yield call("reverse_step", label(dtype, "long rows"), 2, **long | dict(step=steps(n) % 4, return_kept=True))
        yield call("reverse_step_", label(dtype, "long rows"), 2, **long | dict(kept=image(6)))


def _example_table(history: int = 0) -> Tensor:
    """Five rows of coefficients that no sampler has, the second one without noise."""
    table = 2 * uniform(5, len(COLUMNS) + history) - 1
    for name, values in {
        "sigma": (0.3, 0.0, 1.0, 0.5, 0.2),
        "log_var_min": (-4.0,) * 5,
        "log_var_max": (-1.0,) * 5,
        "t": (0.0, 999.0, 7.0, 500.0, 3.0),
    }.items():
        table[:, COLUMNS.index(name)] = torch.tensor(values, dtype=torch.float32, device="cpu")
    return table


def _example_long_table() -> tuple[Tensor, Tensor]:
    """Four long rows with two slots of history, and their addresses.

    The first one has no limit, the second one no noise, the third one sums three noises.
    """
    table = 2 * uniform(4, long_columns(2)) - 1
    for name, values in {
        "limit": (math.inf, 1.0, 0.5, 2.0),
        "sigma": (0.3, 0.0, 1.0, 0.7),
        "log_var_min": (-4.0,) * 4,
        "log_var_max": (-1.0,) * 4,
        "b_z": (0.5, 0.0, 0.0, 0.3),
    }.items():
        table[:, LONG_COLUMNS.index(name)] = torch.tensor(values, dtype=torch.float32, device="cpu")
    table[:, len(LONG_COLUMNS) + 2 :] = 0
    address = torch.tensor([[999, 1], [0, 0], [7, 3], [0, 1]], dtype=torch.int64, device="cpu")
    return table, address
