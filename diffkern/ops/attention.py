"""Attention."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .arguments import check_shape, wide
from .example import DTYPES, SUMS, Example, label, normal
from .flops import Shape, formula
from .registration import Op, fake, gradient, native, same_device
from .transforms import by_torch

op = Op("attention")


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
    if by_torch(q, k, v):
        return composite(q, k, v, scale=scale)
    out, _ = op(q, k, v, scale)
    return out


def _empty_heads(like: Tensor) -> Tensor:
    n, heads, tokens, d = like.shape
    return like.new_empty(n, tokens, heads, d).transpose(1, 2)


@fake("attention", differentiable=True)
def _(q, k, v, scale):
    same_device(q, k=k, v=v)
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@fake("attention_out")
def _(out, q, k, v, scale, terms):
    same_device(q, out=out, k=k, v=v)


@fake("attention_backward")
def _(grad_out, q, k, v, out, lse, scale):
    same_device(q, k=k, v=v, grad_out=grad_out, out=out, lse=lse)
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _save(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, grad_out, _):
    return *native.attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


gradient("attention", _backward, _save)


@formula("attention")
def _two_products(q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    """Queries by keys by d."""
    return 2 * 2 * math.prod(q) * k[2]


@formula("attention_out")
def _(out: Shape, q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    return _two_products(q, k)


@formula("attention_backward")
def _five_products(grad_out: Shape, q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    """One of them makes the scores again."""
    return _two_products(q, k) // 2 * 5


# --- composite and reference -------------------------------------------------------------------------------------


def composite(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """See :func:`diffkern.ops.attention`.

    Torch's own attention would not do: on a CPU it has one derivative, and none forwards.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise RuntimeError(f"{name}: expected [N, heads, tokens, d], got shape {tuple(tensor.shape)}")
        check_shape(name, tensor, (*q.shape[:2], (q if name == "q" else k).shape[2], q.shape[3]))
    with torch.autocast(q.device.type, enabled=False):
        scores = wide(q) * (q.shape[3] ** -0.5 if scale is None else scale) @ wide(k).mT
        return (scores.softmax(-1) @ wide(v)).to(q.dtype)


reference = composite


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 2, heads: int = 2, queries: int = 35, keys: int = 21, d: int = 32) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""

    def tokens(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(n, count, heads, d, dtype=dtype, seed=seed).transpose(1, 2)

    names = ("q", "k", "v")
    for dtype in DTYPES:
        q, k, v = tokens(queries, 1, dtype), tokens(keys, 2, dtype), tokens(keys, 3, dtype)
        for scale in (None, 0.3):
            given, name = dict(q=q, k=k, v=v, scale=scale), label(dtype, *(["scale"] if scale else []))
            yield Example("attention", name, given, names, names, SUMS[dtype])
            backward = dict(grad_out=tokens(queries, 4, dtype), out=tokens(queries, 5, dtype))
            backward |= dict(lse=normal(n, heads, queries, seed=6))
            images = (*names, "grad_out", "out")
            yield Example("attention_backward", name, given | backward, images, tolerance=SUMS[dtype])
    for terms in (None, 1, 2, 3):
        given = dict(out=tokens(queries, 5), q=tokens(queries, 1), k=tokens(keys, 2), v=tokens(keys, 3))
        given |= dict(scale=0.3, terms=terms)
        name, cpu_only = f"{terms} terms", terms is not None
        yield Example("attention_out", name, given, tolerance=SUMS[torch.float32], cpu_only=cpu_only)
