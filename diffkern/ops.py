"""The ops: what a user calls, their shapes for the compiler, and their gradients.

Each one has a kernel for the CPU and for CUDA (``csrc/``) and a plain twin of the same name and signature in
:mod:`diffkern.reference`. Noise is addressed, never drawn from a state: the seed of a sample, a step and a stream
name it, and with them come the same bits on any device, in any batch, on any number of threads (``docs/noise.md``).

Elementwise ops take float32, bfloat16 and float16 tensors of any strides, compute in float32 and round once.
Shapes are ``[N, ...]``: N samples of any shape, images as a rule. Errors name the argument, what was expected and
what came: RuntimeError for shapes, dtypes, devices and indices, TypeError and ValueError for options.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _C  # noqa: F401  registers the ops
from .reference import COLUMNS as COLUMNS

_ops = torch.ops.diffkern

Seeds = int | Sequence[int] | Tensor


def as_seeds(seeds: Seeds, device: torch.device | str | None = None) -> Tensor:
    """Seeds as the kernels take them: int64 [N]. One int means N = 1; ints of [-2^63, 2^64) are taken modulo 2^64."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim > 1:
            raise TypeError(f"seeds: expected an int64 tensor [N], got {seeds.dtype} of shape {tuple(seeds.shape)}")
        return seeds.reshape(-1).contiguous().to(device)
    if isinstance(seeds, (str, bytes, float)):
        raise TypeError(f"seeds: expected an int, ints or an int64 tensor, got {seeds!r}")
    values = list(seeds) if isinstance(seeds, Sequence | range) else [seeds]
    wrapped = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"seeds: expected ints, got {value!r}")
        value = value.__index__()
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seeds: expected ints in [-2^63, 2^64), got {value}")
        wrapped.append((value + 2**63) % 2**64 - 2**63)
    return torch.tensor(wrapped, dtype=torch.int64, device=device)


def _as_index(name: str, index: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(index, Tensor):
        return index
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {index!r}")
    return torch.tensor(index.__index__(), dtype=torch.int64, device=device)


def _without_gradient(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Refuses what would silently cut a gradient."""
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if any(tensor.requires_grad for tensor in ([value] if isinstance(value, Tensor) else value or ())):
                raise RuntimeError(f"{name}: expected no gradient through {op}, got a tensor that requires grad")


def _differentiable_once(op: str) -> None:
    """For an op's gradient, which has none itself and must not pass for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"create_graph: expected False, for {op} can be differentiated once, got True")


# --- noise -------------------------------------------------------------------------------------------------------


def noise(
    seeds: Seeds,
    shape: Sequence[int],
    *,
    step: int | Tensor,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals ``[N, *shape]``, a function of (seed of the sample, step, stream, element) and of nothing else.

    seeds   int64 tensor [N] or ints in [-2^63, 2^64)
    shape   of one sample
    step    in [0, 2^32): one for all, or an int64 tensor [N]
    stream  what the noise is for: 0 the initial x_T, 1 reverse steps, 2 forward noising; others are free
    dtype   float32, or bfloat16 or float16: the float32 value rounded once
    device  where to; None is the seeds' own

    Philox4x32-10 (Salmon et al. 2011) and Box-Muller from 32-bit uniforms, |z| up to 6.76.
    """
    seeds = as_seeds(seeds, device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    shape = [shape] if isinstance(shape, int) else list(shape)
    return _ops.noise(seeds, shape, _as_index("step", step, seeds.device), stream, dtype)


@torch.library.register_fake("diffkern::noise")
def _(seeds, shape, step, stream, dtype):
    return seeds.new_empty([seeds.shape[0], *shape], dtype=dtype)


# --- forward noising ---------------------------------------------------------------------------------------------


def q_sample(
    x_0: Tensor, t: int | Tensor, seeds: Seeds, table: Tensor, *, return_eps: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4), eps made in the kernel.

    x_0         [N, ...]
    t           0-based time steps: one, or an int64 tensor [N]
    seeds       int64 [N]: eps is ``noise(seeds, shape, step=t, stream=2)``
    table       float32 [T, 2], sqrt(alpha_bar) and sqrt(1 - alpha_bar): ``Schedule.q_table``
    return_eps  also return eps, like x_0
    """
    _without_gradient("q_sample", x_0=x_0)
    t, seeds = _as_index("t", t, x_0.device), as_seeds(seeds, x_0.device)
    x_t, eps = _ops.q_sample(x_0, t, seeds, table, return_eps)
    return (x_t, eps) if return_eps else x_t


def q_sample_(x_0: Tensor, t: int | Tensor, seeds: Seeds, table: Tensor) -> None:
    """:func:`q_sample` in place: x_0 becomes x_t."""
    _without_gradient("q_sample_", x_0=x_0)
    _ops.q_sample_(x_0, _as_index("t", t, x_0.device), as_seeds(seeds, x_0.device), table)


@torch.library.register_fake("diffkern::q_sample")
def _(x_0, t, seeds, table, return_eps):
    return torch.empty_like(x_0), torch.empty_like(x_0) if return_eps else x_0.new_empty(0)


@torch.library.register_fake("diffkern::q_sample_")
def _(x_0, t, seeds, table):
    return None


# --- the reverse step --------------------------------------------------------------------------------------------


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

    x                 [N, C, ...]
    out               like x, the network's output; [N, 2C, ...] with ``learned_variance``
    table             float32 [steps, 9 + J]: the columns :data:`COLUMNS`, then k_j
    step              the row: one, or an int64 tensor [N]. Out of range: raises on the CPU, gives NaN on CUDA
    seeds             int64 [N]
    out_uncond        like out: the output without its condition (Ho & Salimans 2022, eq. 6)
    learned_variance  out's second half interpolates the log-variance (Nichol & Dhariwal 2021, eq. 15)
    history           J tensors like x
    return_x0         also return x0_hat, like x
    """
    _without_gradient("reverse_step", x=x, out=out, out_uncond=out_uncond, history=history)
    step, seeds = _as_index("step", step, x.device), as_seeds(seeds, x.device)
    x_next, x0_hat = _ops.reverse_step(
        x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, return_x0
    )
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
    """:func:`reverse_step` in place: x becomes x_next, and ``x0_hat``, a tensor like x, receives the prediction."""
    _without_gradient("reverse_step_", x=x, out=out, out_uncond=out_uncond, history=history, x0_hat=x0_hat)
    step, seeds = _as_index("step", step, x.device), as_seeds(seeds, x.device)
    _ops.reverse_step_(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x0_hat)


@torch.library.register_fake("diffkern::reverse_step")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, return_x0):
    return torch.empty_like(x), torch.empty_like(x) if return_x0 else x.new_empty(0)


@torch.library.register_fake("diffkern::reverse_step_")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x0_hat):
    return None


# --- the training loss -------------------------------------------------------------------------------------------


def noise_loss(out: Tensor, seeds: Seeds, t: int | Tensor, weights: Tensor | None = None) -> Tensor:
    """loss_n = weight_n mean((out - eps)^2) (Ho et al. 2020, eq. 14), eps made again in the kernel instead of stored.

    out      [N, ...]: the network's prediction of eps
    seeds    int64 [N], t: one or int64 [N]: those that :func:`q_sample` made x_t with
    weights  float32 [N] or None: lambda_t; no gradient

    Returns float32 [N]. Differentiable in ``out``.
    """
    _without_gradient("noise_loss", weights=weights)
    return _ops.noise_loss(out, as_seeds(seeds, out.device), _as_index("t", t, out.device), weights)


@torch.library.register_fake("diffkern::noise_loss")
def _(out, seeds, t, weights):
    return out.new_empty(out.shape[0], dtype=torch.float32)


@torch.library.register_fake("diffkern::noise_loss_backward")
def _(grad_loss, out, seeds, t, weights):
    return torch.empty_like(out)


def _noise_loss_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _noise_loss_gradient(ctx, grad_loss):
    _differentiable_once("noise_loss")
    return _ops.noise_loss_backward(grad_loss.contiguous(), *ctx.saved_tensors), None, None, None


torch.library.register_autograd("diffkern::noise_loss", _noise_loss_gradient, setup_context=_noise_loss_save)

# --- attention ---------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v, block by block, without a tokens x tokens matrix (Dao et al. 2022). Differentiable.

    q      [N, heads, tokens, d], of any strides
    k, v   [N, heads, tokens of their own, d]
    scale  None is 1/sqrt(d) (Vaswani et al. 2017, eq. 1)

    Returns [N, heads, tokens, d], in memory [N, tokens, heads, d] for the projection that follows. On the CPU the
    arithmetic is float32, and a sample's bits depend neither on its batch nor on the number of threads.
    """
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if q.is_cuda:  # as long as there is no CUDA kernel
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    out, _ = _ops.attention(q, k, v, scale)
    return out


def _empty_heads(like: Tensor) -> Tensor:
    n, heads, tokens, d = like.shape
    return like.new_empty(n, tokens, heads, d).transpose(1, 2)


@torch.library.register_fake("diffkern::attention")
def _(q, k, v, scale):
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("diffkern::attention_backward")
def _(grad_out, q, k, v, out, lse, scale):
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _attention_save(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _attention_gradient(ctx, grad_out, _):
    _differentiable_once("attention")
    return *_ops.attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


torch.library.register_autograd("diffkern::attention", _attention_gradient, setup_context=_attention_save)

# --- the network -------------------------------------------------------------------------------------------------

from .reference import group_norm_silu  # noqa: E402, F401
