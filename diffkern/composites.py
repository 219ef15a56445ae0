"""Every differentiable op by torch's own ops, with the signature of :mod:`diffkern.ops`.

All derivatives and transforms of torch's work on these. They compute in float32, or in float64 for inputs that are
float64, and round once. Noise comes from ``noise``: the kernel, or for :mod:`diffkern.reference` its twin in NumPy.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .transforms import readable


def noise(
    seeds: Tensor, shape: Sequence[int], *, step: Tensor, stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The kernel's, in any dtype: a constant to every derivative."""
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    return torch.ops.diffkern.noise(seeds, shape, step, stream, kernel_dtype).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _expect(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def _rows(name: str, index: int | Tensor, table: Tensor, x: Tensor) -> Sequence[Tensor]:
    """The columns of each sample's row of the table, to be multiplied by x. Out of range as the kernels: see ops."""
    if isinstance(index, Tensor) and index.dtype != torch.int64:
        raise RuntimeError(f"{name}: expected int64, got {str(index.dtype).removeprefix('torch.')}")
    index, n = torch.as_tensor(index, dtype=torch.int64, device=table.device), x.shape[0]
    _expect(name, index, (), (1,), (n,))
    index = index.reshape(-1)
    inside = (index >= 0) & (index < table.shape[0])
    if readable(inside) and not inside.all():
        raise RuntimeError(f"{name}: expected values in [0, {table.shape[0]}), got {index[~inside][0].item()}")
    rows = torch.where(inside[:, None], table[index.clamp(0, table.shape[0] - 1)], torch.nan).expand(n, -1)
    return rows.reshape(n, table.shape[1], *[1] * (x.ndim - 1)).unbind(1)


# --- forward noising, the reverse step, the loss -----------------------------------------------------------------


def q_sample(
    x_0: Tensor,
    t: Tensor,
    seeds: Tensor,
    table: Tensor,
    *,
    return_eps: bool = False,
    noise: Callable[..., Tensor] = noise,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`diffkern.ops.q_sample`."""
    _expect("seeds", seeds, (x_0.shape[0],))
    a, s = _rows("t", t, table, x_0)
    eps = noise(seeds, x_0.shape[1:], step=t, stream=2)
    x_t = (a * _wide(x_0) + s * eps).to(x_0.dtype)
    return (x_t, eps.to(x_0.dtype)) if return_eps else x_t


COLUMNS = ("p_x", "p_o", "k_x", "k_o", "k_0", "sigma", "log_var_min", "log_var_max", "t")
"""What a row of the coefficient table holds; a column for each of the history's tensors follows."""


def reverse_step(
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
    noise: Callable[..., Tensor] = noise,
    exp: Callable[[Tensor], Tensor] = torch.exp,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`diffkern.ops.reverse_step`."""
    n = x.shape[0]
    doubled = (n, 2 * x.shape[1], *x.shape[2:]) if learned_variance else tuple(x.shape)
    _expect("out", out, doubled)
    _expect("out_uncond", out_uncond, doubled)
    for h in history:
        _expect("history", h, tuple(x.shape))
    _expect("seeds", seeds, (n,))
    _expect("table", table, (table.shape[0], len(COLUMNS) + len(history)))
    p_x, p_o, k_x, k_o, k_0, sigma, log_var_min, log_var_max, t, *k_h = _rows("step", step, table, x)

    def halves(out: Tensor) -> Sequence[Tensor]:
        return _wide(out).chunk(2, 1) if learned_variance else (_wide(out),)

    o, *second_half = halves(out)
    if out_uncond is not None:
        u = halves(out_uncond)[0]
        o = u + guidance * (o - u)
    x0 = p_x * _wide(x) + p_o * o
    if clip:
        x0 = x0.clamp(-1, 1)
    x_next = k_x * _wide(x) + k_o * o + k_0 * x0
    for k, h in zip(k_h, history, strict=True):
        x_next = x_next + k * _wide(h)
    std = sigma
    if learned_variance:
        v = (second_half[0] + 1) * 0.5
        std = sigma * exp(0.5 * (log_var_min + v * (log_var_max - log_var_min)))
    z = noise(seeds, x.shape[1:], step=t.detach().flatten().long(), stream=1)
    x_next = torch.where(sigma == 0, x_next, x_next + std * z).to(x.dtype)
    return (x_next, x0.to(x.dtype)) if return_x0 else x_next


def noise_loss(
    out: Tensor, seeds: Tensor, t: Tensor, weights: Tensor | None = None, *, noise: Callable[..., Tensor] = noise
) -> Tensor:
    """See :func:`diffkern.ops.noise_loss`. float64 of an ``out`` that is float64."""
    n = out.shape[0]
    _expect("seeds", seeds, (n,))
    _expect("weights", weights, (n,))
    eps = noise(seeds, out.shape[1:], step=t, stream=2)
    loss = (_wide(out) - eps).square().unsqueeze(-1).flatten(1).mean(1)
    return loss if weights is None else loss * weights


# --- the network -------------------------------------------------------------------------------------------------


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
    """See :func:`diffkern.ops.group_norm_silu`.

    Torch's own norm would not do: its forward-mode derivative takes no channels_last image.
    """
    n, c = x.shape[:2]
    if groups < 1 or c % groups:
        raise RuntimeError(f"groups: expected a divisor of the {c} channels, got {groups}")
    y, pixel = _wide(x), [1] * (x.ndim - 2)
    _expect("weight", weight, (c,))
    _expect("bias", bias, (c,))
    _expect("scale_shift", scale_shift, (n, 2 * c))
    _expect("add", add, (n, c))
    _expect("residual", residual, tuple(x.shape))
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


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`diffkern.ops.conv3x3`."""
    _expect("weight", weight, (weight.shape[0], x.shape[1], 3, 3))
    return F.conv2d(x, weight, bias, padding=1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """See :func:`diffkern.ops.attention`.

    Torch's own attention would not do: on a CPU it has one derivative, and none forwards.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise RuntimeError(f"{name}: expected [N, heads, tokens, d], got shape {tuple(tensor.shape)}")
        _expect(name, tensor, (*q.shape[:2], (q if name == "q" else k).shape[2], q.shape[3]))
    with torch.autocast(q.device.type, enabled=False):
        scores = _wide(q) * (q.shape[3] ** -0.5 if scale is None else scale) @ _wide(k).mT
        return (scores.softmax(-1) @ _wide(v)).to(q.dtype)
