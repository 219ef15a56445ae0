"""The ops: what a user calls, their shapes for the compiler, and their gradients.

Each one has a kernel for the CPU and for CUDA (``csrc/``) and a plain twin of the same name and signature in
:mod:`diffkern.reference`. Torch's own ops (:mod:`diffkern.composites`) run instead in ``diffkern.torch_ops()``, in a
transform of ``torch.func``, and for tensors with a tangent (:mod:`diffkern.transforms`).

Noise is addressed, never drawn from a state: the seed of a sample, a step and a stream name it, and with them come the
same bits on any device, in any batch, on any number of threads (``docs/noise.md``).

Elementwise ops take float32, bfloat16 and float16 tensors of any strides, compute in float32 and round once.
Shapes are ``[N, ...]``: N samples of any shape, images as a rule. Errors name the argument, what was expected and
what came: RuntimeError for shapes, dtypes, devices and indices, TypeError and ValueError for options.
"""

import dataclasses
import functools
import math
import operator
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import _C, composites, flops, transforms  # noqa: F401  _C registers the ops
from .composites import COLUMNS as COLUMNS
from .packing import PackedConv as PackedConv

_ops = torch.ops.diffkern
_library = transforms.Library("diffkern", "FRAGMENT")

Seeds = int | Sequence[int] | np.ndarray | Tensor
NoneType = type(None)


def as_seeds(seeds: Seeds, device: torch.device | str | None = None) -> Tensor:
    """Seeds as the kernels take them: int64 [N]. One int means N = 1; ints of [-2^63, 2^64) are taken modulo 2^64."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim > 1:
            raise TypeError(f"seeds: expected an int64 tensor [N], got {seeds.dtype} of shape {tuple(seeds.shape)}")
        seeds = seeds if seeds.ndim == 1 and seeds.is_contiguous() else _dense("seeds", seeds.reshape(-1))
        return seeds if device is None or seeds.device == device else seeds.to(device)
    if isinstance(seeds, (str, bytes, float)):
        raise TypeError(f"seeds: expected an int, ints or an int64 tensor, got {seeds!r}")
    if isinstance(seeds, range):
        return _range_of_seeds(seeds).to(device)
    seeds = seeds.tolist() if isinstance(seeds, np.ndarray) else seeds
    values = list(seeds) if isinstance(seeds, Sequence) else [seeds]
    wrapped = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"seeds: expected ints, got {value!r}")
        value = value.__index__()
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seeds: expected ints in [-2^63, 2^64), got {value}")
        wrapped.append((value + 2**63) % 2**64 - 2**63)
    return torch.tensor(wrapped, dtype=torch.int64, device="cpu" if device is None else device)


def _range_of_seeds(seeds: range) -> Tensor:
    """:func:`as_seeds` of a range, without an object for each of its numbers."""
    for value in (seeds[0], seeds[-1]) if seeds else ():
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seeds: expected ints in [-2^63, 2^64), got {value}")
    length = -(-(seeds.stop - seeds.start) // seeds.step) if seeds else 0  # len() ends at 2^63 - 1
    if length >= 2**60:
        raise ValueError(f"seeds: expected fewer than 2^60, got {length}")
    index = np.arange(length, dtype=np.uint64)  # whose arithmetic is modulo 2^64
    return torch.from_numpy((index * np.uint64(seeds.step % 2**64) + np.uint64(seeds.start % 2**64)).view(np.int64))


def _as_index(name: str, index: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(index, Tensor):
        return index
    try:
        if isinstance(index, bool):
            raise TypeError
        index = operator.index(index)
    except TypeError:
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {index!r}") from None
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {index}")
    return torch.tensor(index, dtype=torch.int64, device=device)


def _as_device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
    except (AssertionError, RuntimeError, TypeError):
        raise RuntimeError(f"device: expected one that is here, got {device!r}") from None


def _check(expected: str, kind: type | tuple[type, ...], **options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {expected}, got {reprlib.repr(value)}")


def _dense(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor | None:
    """The tensor itself if it is of that dtype and layout, or else a copy that is."""
    if tensor is None or (dtype in (None, tensor.dtype) and tensor.is_contiguous(memory_format=memory_format)):
        return tensor
    if not torch.compiler.is_compiling():
        _check_memory(name, tensor)
    return tensor.to(dtype or tensor.dtype).contiguous(memory_format=memory_format)


def _check_memory(name: str, tensor: Tensor) -> None:
    """Refuses a tensor whose storage was freed, which torch would read. The kernels look for themselves."""
    try:
        held = tensor.untyped_storage().nbytes()
    except NotImplementedError:  # it stands for another tensor
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if tensor.numel() and held < needed:
        raise RuntimeError(f"{name}: expected a storage of at least {needed} bytes, got {held}")


def _same_device(like: Tensor, **tensors: Tensor | None) -> None:
    """For the fakes: a meta tensor among others would make nothing of everything."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(f"{name}: expected device {like.device}, got {tensor.device}")


def _fake(op: str, *, differentiable: bool = False) -> Callable[[Callable], Callable]:
    """Registers an op's shapes, and that it refuses tangents. One that is differentiable does with its gradient."""
    if not differentiable:
        _library.without_gradient(op)
    return torch.library.register_fake(f"diffkern::{op}")


def _gradient(op: str, gradient: Callable, save: Callable) -> None:
    torch.library.register_autograd(f"diffkern::{op}", gradient, setup_context=save, lib=_library)


def _run(op: Callable, *args: Any) -> Any:
    """Calls an op for which ``transforms.by_torch`` said no; without a gradient, past its kernel for autograd."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except RuntimeError as error:
        if str(error).endswith("got float64"):
            raise RuntimeError(f"{error}, which diffkern.torch_ops() takes") from None
        raise


def _without_gradient(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Refuses what would silently cut a gradient."""
    if torch.is_grad_enabled():
        for name, tensor in transforms.named(tensors):
            if tensor.requires_grad:
                raise RuntimeError(f"{name}: expected no gradient through {op}, got a tensor that requires grad")


def _in_place(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> bool:
    """Must a composite run, for an op that writes in place? Refuses all that differentiates or transforms it."""
    if not transforms.by_torch(*tensors.values()):
        return False
    for name, tensor in transforms.named(tensors):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or transforms.is_dual(tensor):
            raise RuntimeError(
                f"{name}: expected a plain tensor, for {op} writes in place and has no forward-mode derivative (jvp) "
                f"and no transforms, as {op.removesuffix('_')} has, got one with a tangent or of torch.func"
            )
    return True


def _differentiable_once(op: str) -> None:
    """For an op's gradient, which has none itself and must not pass for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"create_graph: expected False, for {op} can be differentiated once, and any number of times in "
            f"diffkern.torch_ops(), got True"
        )


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

    seeds   int64 tensor [N], or ints in [-2^63, 2^64), as a NumPy array if need be
    shape   of one sample
    step    in [0, 2^32): one for all, or an int64 tensor [N]
    stream  what the noise is for: 0 the initial x_T, 1 reverse steps, 2 forward noising. 3 to 5 are draws of training
            and of evaluation (docs/noise.md); from 6 on they are free
    dtype   float32, or bfloat16 or float16: the float32 value rounded once; in ``torch_ops`` also float64, unrounded
    device  where to; None is the seeds' own

    Philox4x32-10 (Salmon et al. 2011) and Box-Muller from 32-bit uniforms, |z| up to 6.76.
    """
    seeds = as_seeds(seeds, None if device is None else _as_device(device))
    shape = [shape] if isinstance(shape, int) else shape
    _check("ints", (list, tuple), shape=shape)
    for size in shape:
        _check("ints", (Integral, torch.SymInt), shape=size)
    _check("an int", int, stream=stream)
    _check("a torch.dtype", torch.dtype, dtype=dtype)
    step = _as_index("step", step, seeds.device)
    if transforms.by_torch():
        return composites.noise(seeds, shape, step=step, stream=stream, dtype=dtype)
    return _run(_ops.noise, seeds, shape, step, stream, dtype)


@torch.library.register_fake("diffkern::noise")
def _(seeds, shape, step, stream, dtype):
    _same_device(seeds, step=step)
    return seeds.new_empty([seeds.shape[0], *shape], dtype=dtype)


@functools.partial(torch.library.register_vmap, "diffkern::noise")
def _(info, in_dims, seeds, shape, step, stream, dtype):
    """The samples of all batches side by side."""
    of_seeds, _, of_step, *_ = in_dims
    seeds = seeds.expand(info.batch_size, -1) if of_seeds is None else seeds.movedim(of_seeds, 0)
    step = step.expand(info.batch_size, *step.shape) if of_step is None else step.movedim(of_step, 0)
    step = step.reshape(info.batch_size, -1).expand(seeds.shape)
    z = _ops.noise(seeds.flatten(), shape, step.flatten(), stream, dtype)
    return z.unflatten(0, seeds.shape), 0


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
    _check("a tensor", Tensor, x_0=x_0, table=table)
    _check("True or False", bool, return_eps=return_eps)
    t, seeds = _as_index("t", t, x_0.device), as_seeds(seeds, x_0.device)
    if transforms.by_torch(x_0, table):
        return composites.q_sample(x_0, t, seeds, table, return_eps=return_eps)
    _without_gradient("q_sample outside of diffkern.torch_ops()", x_0=x_0, table=table)
    x_t, eps = _run(_ops.q_sample, x_0, t, seeds, table, return_eps)
    return (x_t, eps) if return_eps else x_t


def q_sample_(x_0: Tensor, t: int | Tensor, seeds: Seeds, table: Tensor) -> None:
    """:func:`q_sample` in place: x_0 becomes x_t."""
    _check("a tensor", Tensor, x_0=x_0, table=table)
    _without_gradient("q_sample_", x_0=x_0, table=table)
    t, seeds = _as_index("t", t, x_0.device), as_seeds(seeds, x_0.device)
    if _in_place("q_sample_", x_0=x_0, table=table):
        x_0.copy_(composites.q_sample(x_0, t, seeds, table))
    else:
        _run(_ops.q_sample_, x_0, t, seeds, table)
        transforms.mark_written(x_0)


@_fake("q_sample")
def _(x_0, t, seeds, table, return_eps):
    _same_device(x_0, t=t, seeds=seeds, table=table)
    return torch.empty_like(x_0), torch.empty_like(x_0) if return_eps else x_0.new_empty(0)


@_fake("q_sample_")
def _(x_0, t, seeds, table):
    _same_device(x_0, t=t, seeds=seeds, table=table)


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
    _check("True or False", bool, return_x0=return_x0)
    step, seeds = _as_index("step", step, x.device), as_seeds(seeds, x.device)
    if transforms.by_torch(x, out, table, out_uncond, history):
        return composites.reverse_step(
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
    _without_gradient(
        "reverse_step outside of diffkern.torch_ops()",
        x=x,
        out=out,
        table=table,
        out_uncond=out_uncond,
        history=history,
    )
    options = (out_uncond, guidance, clip, learned_variance, history)
    x_next, x0_hat = _run(_ops.reverse_step, x, out, table, step, seeds, *options, return_x0)
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
    _check("a tensor or None", (Tensor, NoneType), x0_hat=x0_hat)
    tensors = dict(x=x, out=out, table=table, out_uncond=out_uncond, history=history, x0_hat=x0_hat)
    _without_gradient("reverse_step_", **tensors)
    step, seeds = _as_index("step", step, x.device), as_seeds(seeds, x.device)
    if not _in_place("reverse_step_", **tensors):
        options = (out_uncond, guidance, clip, learned_variance, history)
        _run(_ops.reverse_step_, x, out, table, step, seeds, *options, x0_hat)
        transforms.mark_written(x, x0_hat)
        return
    options = dict(out_uncond=out_uncond, guidance=guidance, clip=clip, learned_variance=learned_variance)
    x_next, predicted = composites.reverse_step(x, out, table, step, seeds, **options, history=history, return_x0=True)
    x.copy_(x_next)
    if x0_hat is not None:
        x0_hat.copy_(predicted)


@_fake("reverse_step")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, return_x0):
    _same_device(x, out=out, table=table, step=step, seeds=seeds, out_uncond=out_uncond)
    for h in history:
        _same_device(x, history=h)
    return torch.empty_like(x), torch.empty_like(x) if return_x0 else x.new_empty(0)


@_fake("reverse_step_")
def _(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x0_hat):
    _same_device(x, out=out, table=table, step=step, seeds=seeds, out_uncond=out_uncond, x0_hat=x0_hat)
    for h in history:
        _same_device(x, history=h)


def _check_step(x, out, table, out_uncond, guidance, clip, learned_variance, history) -> None:
    """The types and values that the dispatcher would let pass, or whose names it would not say."""
    _check("a tensor", Tensor, x=x, out=out, table=table)
    _check("a tensor or None", (Tensor, NoneType), out_uncond=out_uncond)
    _check("a number", Real, guidance=guidance)
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    _check("True or False", bool, clip=clip, learned_variance=learned_variance)
    _check("a list of tensors", (list, tuple), history=history)
    for h in history:
        _check("tensors", Tensor, history=h)


# --- the training loss -------------------------------------------------------------------------------------------


def noise_loss(out: Tensor, seeds: Seeds, t: int | Tensor, weights: Tensor | None = None) -> Tensor:
    """loss_n = weight_n mean((out - eps)^2) (Ho et al. 2020, eq. 14), eps made again in the kernel instead of stored.

    out      [N, ...]: the network's prediction of eps
    seeds    int64 [N], t: one or int64 [N]: those that :func:`q_sample` made x_t with
    weights  float32 [N] or None: lambda_t; no gradient

    Returns float32 [N]. Differentiable in ``out``.
    """
    _check("a tensor", Tensor, out=out)
    _check("a tensor or None", (Tensor, NoneType), weights=weights)
    seeds, t = as_seeds(seeds, out.device), _as_index("t", t, out.device)
    if transforms.by_torch(out, weights):
        return composites.noise_loss(out, seeds, t, weights)
    _without_gradient("noise_loss outside of diffkern.torch_ops()", weights=weights)
    return _run(_ops.noise_loss, out, seeds, t, weights)


@_fake("noise_loss", differentiable=True)
def _(out, seeds, t, weights):
    _same_device(out, seeds=seeds, t=t, weights=weights)
    return out.new_empty(out.shape[0], dtype=torch.float32)


@_fake("noise_loss_backward")
def _(grad_loss, out, seeds, t, weights):
    _same_device(out, grad_loss=grad_loss, seeds=seeds, t=t, weights=weights)
    return torch.empty_like(out)


def _noise_loss_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _noise_loss_gradient(ctx, grad_loss):
    _differentiable_once("noise_loss")
    return _ops.noise_loss_backward(grad_loss.contiguous(), *ctx.saved_tensors), None, None, None


_gradient("noise_loss", _noise_loss_gradient, _noise_loss_save)

# --- attention ---------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v, block by block, without a tokens x tokens matrix (Dao et al. 2022). Differentiable.

    q      [N, heads, tokens, d], of any strides
    k, v   [N, heads, tokens of their own, d]
    scale  None is 1/sqrt(d) (Vaswani et al. 2017, eq. 1)

    Returns [N, heads, tokens, d], in memory [N, tokens, heads, d] for the projection that follows. Sums are float32,
    and so is all arithmetic on the CPU; with AMX, many queries and d a multiple of 32 up to 256, products are those of
    three bfloat16 terms a number, which are as exact, but NaN for what is infinite. CUDA multiplies bfloat16 and
    float16 on tensor cores, with probabilities rounded to the dtype, where d is a multiple of 8 up to 512. A sample's
    bits depend neither on its batch nor on the number of threads.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a finite number, got {scale!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if transforms.by_torch(q, k, v):
        return composites.attention(q, k, v, scale=scale)
    out, _ = _run(_ops.attention, q, k, v, scale)
    return out


def _empty_heads(like: Tensor) -> Tensor:
    n, heads, tokens, d = like.shape
    return like.new_empty(n, tokens, heads, d).transpose(1, 2)


@_fake("attention", differentiable=True)
def _(q, k, v, scale):
    _same_device(q, k=k, v=v)
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_fake("attention_out")
def _(out, q, k, v, scale, terms):
    _same_device(q, out=out, k=k, v=v)


@_fake("attention_backward")
def _(grad_out, q, k, v, out, lse, scale):
    _same_device(q, k=k, v=v, grad_out=grad_out, out=out, lse=lse)
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _attention_save(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _attention_gradient(ctx, grad_out, _):
    _differentiable_once("attention")
    return *_ops.attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


_gradient("attention", _attention_gradient, _attention_save)

# --- convolution -------------------------------------------------------------------------------------------------


def pack_conv(weight: Tensor, *, terms: int | None = None) -> PackedConv:
    """A convolution's weight as :func:`conv2d` reads it: to be made once.

    weight  [K, C, k, k], k of 1 or 3
    terms   for products of bfloat16, summed in float32: every number, of the weight and of the image, is the sum of so
            many of them, 1 to 3, and of two numbers 1, 3 or 6 products are made. Three terms have all 24 bits of a
            float: the result is as exact as by products of float32, and with AMX it comes faster. Two have 16 bits.
            None: products of the weight's own dtype, float32 or bfloat16

    Its tensor is [k k, column blocks, C, column block], the columns being the K output channels and zeros behind them.
    With terms it is [columns / 32, C / 32, k k, terms, 2, 16, 16, 2] in bfloat16, with zeros behind C too: the columns
    in halves, in which each has its channels in pairs.
    """
    _check_weight(weight, 3, 1)
    _check_terms(terms)
    _check_memory("weight", weight)
    flat = weight.detach().flatten(2)
    if terms or weight.dtype == torch.bfloat16:
        return _packed(_pack_terms(flat, terms or 1), weight)
    column_block = 64 if len(weight) > 4 else 1
    blocks = F.pad(flat, (0, 0, 0, 0, 0, -len(weight) % column_block)).unflatten(0, (-1, column_block))
    return _packed(blocks.permute(3, 0, 2, 1).contiguous(), weight)


def pack_upsampling(weight: Tensor, *, terms: int) -> PackedConv:
    """A 3x3 convolution's weight as :func:`conv2d` reads it to upsample by terms: [K, C, 3, 3].

    Four pixels of a doubled image are one. Each parity of a row and of a column therefore has a kernel of 2x2 sums of
    taps, 4/9 of the multiplications. The tensor is the :func:`pack_conv` of the four, one after the other.
    """
    _check_weight(weight, 3)
    _check_terms(terms)
    _check_memory("weight", weight)
    even_odd = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64, device="cpu")
    sums = [rows @ weight.detach().double() @ columns.T for rows in even_odd for columns in even_odd]
    return _packed(torch.cat([_pack_terms(kernel.flatten(2), terms) for kernel in sums]), weight)


def _packed(tensor: Tensor, weight: Tensor) -> PackedConv:
    out_channels, in_channels, kernel, _ = weight.shape
    return PackedConv(tensor, in_channels, out_channels, kernel)


def _check_weight(weight: Tensor, *kernels: int) -> None:
    _check("a tensor", Tensor, weight=weight)
    shape = tuple(weight.shape)
    if weight.ndim != 4 or shape[2:] not in [(k, k) for k in kernels]:
        expected = " or ".join(f"[K, C, {k}, {k}]" for k in kernels)
        raise RuntimeError(f"weight: expected {expected}, got shape {shape}")
    if weight.numel() == 0:
        raise RuntimeError(f"weight: expected at least one input and one output channel, got shape {shape}")


def _check_packed(**weights: PackedConv) -> None:
    for name, weight in weights.items():
        if not isinstance(weight, PackedConv):
            raise TypeError(f"{name}: expected a PackedConv, as pack_conv returns it, got {type(weight).__name__}")


def _check_terms(terms: int | None) -> None:
    _check("an int", (int, NoneType), terms=terms)
    if terms not in (None, 1, 2, 3):
        raise ValueError(f"terms: expected 1, 2 or 3, got {terms}")


def _pack_terms(weight: Tensor, terms: int) -> Tensor:
    """[K, C, matrices] -> [columns / 32, C / 32, matrices, terms, 2, 16, 16, 2]"""
    rest, parts = F.pad(weight, (0, 0, 0, -weight.shape[1] % 32, 0, -len(weight) % 32)), []
    for _ in range(terms):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].to(rest.dtype)
    blocks = torch.stack(parts).unflatten(2, (-1, 16, 2)).unflatten(1, (-1, 2, 16))
    return blocks.permute(1, 4, 7, 0, 2, 5, 3, 6).contiguous()


def pack_taps(weight: Tensor) -> PackedConv:
    """A 3x3 convolution's weight as :func:`conv2d` reads it where stride and padding are 1: float32 [K, C, 3, 3].

    By Winograd's F(4x4, 3x3) (Lavin & Gray 2016), a quarter of the multiplications, whose 36 matrices the kernel makes
    of the 9 taps where it needs them. The tensor is [column blocks, C, 9, column block], with zeros behind the K
    columns.
    """
    _check_weight(weight, 3)
    return _packed(_ops.pack_taps(weight.detach()), weight)


@_fake("pack_taps")
def _(weight):
    return weight.new_empty(-(-weight.shape[0] // 32), weight.shape[1], 9, 32)


def expand_taps(taps: PackedConv) -> PackedConv:
    """The same weight as the matrices that are made of :func:`pack_taps`' result: [36, column blocks, C, column block].

    They are four times the bytes, and faster where there are many tiles of 4x4 pixels to use them on. :func:`conv2d`
    gives the same bits by either, so that which one it has may depend on the batch.
    """
    _check_packed(taps=taps)
    return dataclasses.replace(taps, tensor=_ops.expand_taps(taps.tensor))


@_fake("expand_taps")
def _(taps):
    return taps.new_empty(36, -(-taps.shape[0] // 2), taps.shape[1], 64)


def conv2d(
    x: Tensor,
    packed: PackedConv,
    bias: Tensor | None = None,
    *,
    out_channels: int | None = None,
    stride: int = 1,
    padding: int = 1,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """conv(cat(x, skip)) + bias + add + residual in one pass: for inference on a CPU, channels_last.

    x             [N, C, H, W], float32, or with a weight of one term bfloat16 too, the result being like it
    packed        the weight, by :func:`pack_conv`, :func:`pack_upsampling`, :func:`pack_taps` or :func:`expand_taps`
    bias          [K] or None
    out_channels  K, which the weight knows: None, or the same number
    stride        the output's size is the image's, divided by it and rounded up
    padding       rows of zeros at the top and columns at the left. Reads past the bottom and right give 0, so that
                  stride=2, padding=0 pads the bottom and right
    skip          [N, C', H, W]: further channels, of the up path; the weight then has C + C'
    add           [N, K]: to every pixel (the time embedding)
    residual      like the result: to it
    upsample      doubles the image first, nearest neighbour

    Returns [N, K, H', W'], channels_last. A sample's bits depend neither on its batch nor on the number of threads.
    """
    _check("a tensor", Tensor, x=x)
    _check_packed(packed=packed)
    _check("a tensor or None", (Tensor, NoneType), bias=bias, skip=skip, add=add, residual=residual)
    _check("an int", int, stride=stride, padding=padding)
    _check("True or False", bool, upsample=upsample)
    if stride < 1:
        raise ValueError(f"stride: expected an int of at least 1, got {stride}")
    if out_channels is not None:
        _check("an int", int, out_channels=out_channels)
        if out_channels < 1:
            raise ValueError(f"out_channels: expected an int of at least 1, got {out_channels}")
        if out_channels != packed.out_channels:
            raise RuntimeError(f"out_channels: expected {packed.out_channels}, those of packed, got {out_channels}")
    if x.device.type == "cuda":
        raise RuntimeError(f"x: expected device cpu, the only one that conv2d has a kernel for, got {x.device}")
    _without_gradient("conv2d", x=x, packed=packed.tensor, bias=bias, skip=skip, add=add, residual=residual)
    x, skip, residual = (_channels_last(*image) for image in (("x", x), ("skip", skip), ("residual", residual)))
    height, width = (-(-size * (2 if upsample else 1) // stride) for size in x.shape[2:])
    y = torch.empty(
        (x.shape[0], packed.out_channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    bias, add = _dense("bias", bias), _dense("add", add)
    counts = packed.in_channels, packed.out_channels
    _ops.conv2d_out(y, x, skip, packed.tensor, *counts, bias, add, residual, stride, padding, upsample)
    return y


def _channels_last(name: str, image: Tensor | None) -> Tensor | None:
    if image is not None and image.ndim != 4:
        raise RuntimeError(f"{name}: expected [N, C, H, W], got shape {tuple(image.shape)}")
    return _dense(name, image, memory_format=torch.channels_last)


@_fake("conv2d_out")
def _(y, x, skip, packed, in_channels, out_channels, bias, add, residual, stride, padding, upsample):
    _same_device(x, y=y, skip=skip, packed=packed, bias=bias, add=add, residual=residual)


# --- the convolution of training ---------------------------------------------------------------------------------


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
    _check("a tensor", Tensor, x=x, weight=weight)
    _check("a tensor or None", (Tensor, NoneType), bias=bias)
    if transforms.by_torch(x, weight, bias):
        return composites.conv3x3(x, weight, bias)
    return _run(_ops.conv3x3, x, weight, _dense("bias", bias))


def _empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@_fake("conv3x3", differentiable=True)
def _(x, weight, bias):
    _same_device(x, weight=weight, bias=bias)
    return _empty_channels_last(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


@_fake("conv3x3_backward")
def _(grad_y, x, weight, of_x, of_weight):
    _same_device(x, grad_y=grad_y, weight=weight)
    return tuple(
        _empty_channels_last(tensor, tensor.shape) if wanted else x.new_empty(0)
        for tensor, wanted in ((x, of_x), (weight, of_weight))
    )


def _conv3x3_save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _conv3x3_gradient(ctx, grad_y):
    _differentiable_once("conv3x3")
    of_x, of_weight, of_bias = ctx.needs_input_grad
    grad_x, grad_weight = _ops.conv3x3_backward(grad_y, *ctx.saved_tensors, of_x, of_weight)
    grad_bias = grad_y.sum((0, 2, 3)) if of_bias else None
    return grad_x if of_x else None, grad_weight if of_weight else None, grad_bias


_gradient("conv3x3", _conv3x3_gradient, _conv3x3_save)

# --- group norm --------------------------------------------------------------------------------------------------


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
        if not isinstance(tensor, Tensor | None):
            raise TypeError(f"{name}: expected a tensor or None, got {type(tensor).__name__}")
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise TypeError(f"groups: expected an int, got {groups!r}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {eps!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
    if transforms.by_torch(x, weight, bias, scale_shift, add, residual):
        return composites.group_norm_silu(
            x, weight, bias, groups, eps=eps, scale_shift=scale_shift, add=add, residual=residual, silu=silu
        )
    coefficients = (("weight", weight), ("bias", bias), ("scale_shift", scale_shift), ("add", add))
    weight, bias, scale_shift, add = (_dense(name, tensor, torch.float32) for name, tensor in coefficients)
    y, _, _ = _run(_ops.group_norm_silu, x, weight, bias, groups, eps, scale_shift, add, residual, silu)
    return y


def _empty_like_dense(x: Tensor) -> Tensor:
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@_fake("group_norm_silu", differentiable=True)
def _(x, weight, bias, groups, eps, scale_shift, add, residual, silu):
    _same_device(x, weight=weight, bias=bias, scale_shift=scale_shift, add=add, residual=residual)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return _empty_like_dense(x), mean, rstd


@_fake("group_norm_silu_out")
def _(y, x, skip, weight, bias, groups, eps, scale_shift, silu):
    _same_device(y, x=x, skip=skip, weight=weight, bias=bias, scale_shift=scale_shift)


@_fake("group_norm_silu_backward")
def _(grad_y, x, mean, rstd, weight, bias, groups, scale_shift, add, silu):
    factors = dict(mean=mean, rstd=rstd, weight=weight, bias=bias, scale_shift=scale_shift, add=add)
    _same_device(x, grad_y=grad_y, **factors)
    grad_offset, grad_slope = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return _empty_like_dense(x), grad_offset, grad_slope


def _group_norm_silu_save(ctx, inputs, output):
    x, weight, bias, ctx.groups, _, scale_shift, add, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale_shift, add)


def _group_norm_silu_gradient(ctx, grad_y, *_):
    _differentiable_once("group_norm_silu")
    x, mean, rstd, weight, bias, scale_shift, add = ctx.saved_tensors
    grad_x, grad_offset, grad_slope = _ops.group_norm_silu_backward(
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


_gradient("group_norm_silu", _group_norm_silu_gradient, _group_norm_silu_save)

flops.register()
