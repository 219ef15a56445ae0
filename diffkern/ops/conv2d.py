"""Convolution for inference, by a weight that is packed once."""

import dataclasses
import math
from collections.abc import Iterator
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import check_memory, check_types, dense
from .example import Example, normal
from .flops import Shape, convolution, formula
from .registration import fake, native, refuse_gradient, same_device


@dataclasses.dataclass(frozen=True, eq=False)
class PackedConv:
    """The weight [out_channels, in_channels, kernel, kernel] of ``ops.conv2d``, by one of ``ops.pack_*``.

    The tensor's layout belongs to the kernels. Its blocks have zeros behind the last channels, so that it cannot tell
    the counts.
    """

    tensor: Tensor = dataclasses.field(repr=False)
    in_channels: int
    out_channels: int
    kernel: int


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
    check_memory("weight", weight)
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
    check_memory("weight", weight)
    even_odd = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64, device="cpu")
    sums = [rows @ weight.detach().double() @ columns.T for rows in even_odd for columns in even_odd]
    return _packed(torch.cat([_pack_terms(kernel.flatten(2), terms) for kernel in sums]), weight)


def _packed(tensor: Tensor, weight: Tensor) -> PackedConv:
    out_channels, in_channels, kernel, _ = weight.shape
    return PackedConv(tensor, in_channels, out_channels, kernel)


def _check_weight(weight: Tensor, *kernels: int) -> None:
    check_types("a tensor", Tensor, weight=weight)
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
    check_types("an int", (int, NoneType), terms=terms)
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
    return _packed(native.pack_taps(weight.detach()), weight)


@fake("pack_taps")
def _(weight):
    return weight.new_empty(-(-weight.shape[0] // 32), weight.shape[1], 9, 32)


def expand_taps(taps: PackedConv) -> PackedConv:
    """The same weight as the matrices that are made of :func:`pack_taps`' result: [36, column blocks, C, column block].

    They are four times the bytes, and faster where there are many tiles of 4x4 pixels to use them on. :func:`conv2d`
    gives the same bits by either, so that which one it has may depend on the batch.
    """
    _check_packed(taps=taps)
    return dataclasses.replace(taps, tensor=native.expand_taps(taps.tensor))


@fake("expand_taps")
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
    check_types("a tensor", Tensor, x=x)
    _check_packed(packed=packed)
    check_types("a tensor or None", (Tensor, NoneType), bias=bias, skip=skip, add=add, residual=residual)
    check_types("an int", int, stride=stride, padding=padding)
    check_types("True or False", bool, upsample=upsample)
    if stride < 1:
        raise ValueError(f"stride: expected an int of at least 1, got {stride}")
    if out_channels is not None:
        check_types("an int", int, out_channels=out_channels)
        if out_channels < 1:
            raise ValueError(f"out_channels: expected an int of at least 1, got {out_channels}")
        if out_channels != packed.out_channels:
            raise RuntimeError(f"out_channels: expected {packed.out_channels}, those of packed, got {out_channels}")
    if x.device.type == "cuda":
        raise RuntimeError(f"x: expected device cpu, the only one that conv2d has a kernel for, got {x.device}")
    tensors = dict(x=x, packed=packed.tensor, bias=bias, skip=skip, add=add, residual=residual)
    refuse_gradient("conv2d", tensors.items())
    x, skip, residual = (_channels_last(*image) for image in (("x", x), ("skip", skip), ("residual", residual)))
    height, width = (-(-size * (2 if upsample else 1) // stride) for size in x.shape[2:])
    y = torch.empty(
        (x.shape[0], packed.out_channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    bias, add = dense("bias", bias), dense("add", add)
    counts = packed.in_channels, packed.out_channels
    native.conv2d_out(y, x, skip, packed.tensor, *counts, bias, add, residual, stride, padding, upsample)
    return y


def _channels_last(name: str, image: Tensor | None) -> Tensor | None:
    if image is not None and image.ndim != 4:
        raise RuntimeError(f"{name}: expected [N, C, H, W], got shape {tuple(image.shape)}")
    return dense(name, image, memory_format=torch.channels_last)


@fake("conv2d_out")
def _(y, x, skip, packed, in_channels, out_channels, bias, add, residual, stride, padding, upsample):
    same_device(x, y=y, skip=skip, packed=packed, bias=bias, add=add, residual=residual)


@formula("conv2d_out")
def _(y: Shape, x: Shape, skip: Shape | None, packed: Shape, *args: Any, **kwargs: Any) -> int:
    """The packed weight tells the taps: one matrix is a 1x1 kernel, all others are made of a 3x3 one."""
    matrices = packed[2] if len(packed) > 4 or packed[3] == 32 else packed[0]
    return convolution(y, x[1] + (skip[1] if skip else 0), 1 if matrices == 1 else 9)


# --- reference ---------------------------------------------------------------------------------------------------


POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.25, -1.25)}
"""Winograd's evaluation points, besides infinity; for tiles of 4 these have half the error of the points 1 and 2."""


def winograd(tile: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A^T, G and B^T of F(tile x tile, 3x3): y = A^T ((G g G^T) . (B^T d B)) A (Lavin & Gray 2016, eq. 8).

    Polynomials are multiplied by their values at points (Toom-Cook): A^T and G evaluate, B^T interpolates, transposed.
    """
    points = np.array(POINTS[tile])
    others = [np.delete(points, i) for i in range(len(points))]
    infinity = np.eye(tile + 2)[-1]
    A_T = np.vstack((np.vander(points, tile, increasing=True), infinity[-tile:])).T
    G = np.vstack((np.vander(points, 3, increasing=True), infinity[-3:]))
    G[:-1] /= [[np.prod(point - rest)] for point, rest in zip(points, others, strict=True)]
    B_T = np.vstack([np.pad(np.poly(rest)[::-1], (0, 1)) for rest in others] + [np.poly(points)[::-1]])
    return tuple(torch.from_numpy(matrix.copy()).to(like) for matrix in (A_T, G, B_T))


def pack_taps_reference(weight: Tensor) -> PackedConv:
    """See :func:`diffkern.ops.pack_taps`."""
    out_channels, in_channels, kernel, _ = weight.shape
    blocks = F.pad(weight.detach().flatten(2), (0, 0, 0, 0, 0, -len(weight) % 32)).unflatten(0, (-1, 32))
    return PackedConv(blocks.permute(0, 2, 3, 1).contiguous(), in_channels, out_channels, kernel)


def expand_taps_reference(taps: PackedConv) -> PackedConv:
    """See :func:`diffkern.ops.expand_taps`."""
    _, G, _ = winograd(4, taps.tensor)
    matrices = torch.einsum("it,bctk->ibck", torch.kron(G, G), taps.tensor)
    matrices = F.pad(matrices, (0, 0, 0, 0, 0, len(taps.tensor) % 2))
    return dataclasses.replace(taps, tensor=matrices.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3).contiguous())


def reference(
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
    """See :func:`diffkern.ops.conv2d`."""
    packed, out_channels = packed.tensor, packed.out_channels
    x = x if skip is None else torch.cat((x, skip), dim=1)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    height, width = (-(-size // stride) for size in x.shape[2:])
    if packed.dtype == torch.bfloat16:
        packed = packed.to(x.dtype).sum(dim=3).permute(2, 1, 4, 6, 0, 3, 5).flatten(4).flatten(1, 3)
        packed = packed[:, : x.shape[1]].transpose(1, 2)
    elif packed.shape[3] == 32:  # by pack_taps
        packed = packed.permute(2, 0, 1, 3)
    matrices = packed.transpose(1, 2).flatten(2)[:, :, :out_channels]  # [matrices, C, K]
    side = math.isqrt(len(matrices))
    matrices = matrices.unflatten(0, (side, side))
    if side == 2:  # by pack_upsampling
        seen = F.pad(x[:, :, ::2, ::2], (1, 1, 1, 1)).unfold(2, height // 2 + 1, 1).unfold(3, width // 2 + 1, 1)
        quarters = packed.transpose(1, 2).flatten(2).unflatten(2, (2, 2, -1))[..., :out_channels]
        kernels = quarters.permute(2, 3, 4, 1, 0).unflatten(4, (2, 2))  # by parity, [K, C, 2, 2]
        parts = [F.conv2d(seen[:, :, i, j], kernels[i, j]) for i in (0, 1) for j in (0, 1)]
        y = F.pixel_shuffle(torch.stack(parts, dim=2).flatten(1, 2), 2)
    elif side <= 3:
        y = F.conv2d(F.pad(x, (padding, side, padding, side)), matrices.permute(3, 2, 0, 1), stride=stride)
    else:
        tile = side - 2
        A_T, _, B_T = winograd(tile, x)
        d = F.pad(x, (padding, 1 + tile, padding, 1 + tile)).unfold(2, side, tile).unfold(3, side, tile)
        m = torch.einsum("nchwij,ijck->nkhwij", B_T @ d @ B_T.T, matrices)
        y = (A_T @ m @ A_T.T).transpose(3, 4).flatten(4).flatten(2, 3)  # [N, K, tiles, tiles, tile, tile]
    y = y[:, :, :height, :width]
    if bias is not None:
        y = y + bias[:, None, None]
    if add is not None:
        y = y + add[:, :, None, None]
    return y if residual is None else y + residual


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 2, c: int = 32, k: int = 33, h: int = 5, w: int = 6) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""

    def image(channels: int, seed: int, factor: int = 1) -> Tensor:
        return normal(n, channels, factor * h, factor * w, seed=seed, last=True)

    weight = 0.1 * normal(k, c, 3, 3, seed=1)
    yield Example("pack_conv", "3x3", dict(weight=weight))
    yield Example("pack_taps", "3x3", dict(weight=weight), ("weight",))
    taps = PackedConv(native.pack_taps(weight), c, k, 3)
    yield Example("expand_taps", "3x3", dict(taps=taps))
    if weight.numel() == 0:
        return
    x, packed = dict(x=image(c, 2)), pack_conv(weight)
    options = dict(bias=normal(k, seed=3), add=normal(n, k, seed=4), residual=image(k, 5))
    parts = dict(x=image(c // 3, 2), skip=image(c - c // 3, 6))
    calls = {
        "plain": (packed, x, 1e-4),
        "every option": (packed, options | parts, 1e-4),
        "upsampling": (packed, options | x | dict(residual=image(k, 5, factor=2), upsample=True), 1e-4),
        "stride": (packed, x | dict(stride=2, padding=0), 1e-4),
        "1x1": (pack_conv(weight[:, :, :1, :1]), options | x | dict(padding=0), 1e-4),
        "taps": (taps, options | x, 1e-4),
        "matrices": (expand_taps(taps), options | x, 1e-4),
    }
    for terms, tolerance in ((1, 5e-2), (2, 1e-3), (3, 1e-4)):
        calls[f"{terms} terms"] = (pack_conv(weight, terms=terms), options | x, tolerance)
        upsampling = pack_upsampling(weight, terms=terms)
        calls[f"{terms} terms, upsampling"] = (upsampling, dict(add=options["add"], upsample=True) | x, tolerance)
    images = ("x", "skip", "residual")
    for name, (packed, given, tolerance) in calls.items():
        yield Example("conv2d", name, given | dict(packed=packed), images, tolerance=tolerance)
        every = dict(skip=None, bias=None, add=None, residual=None, stride=1, padding=1, upsample=False) | given
        height, width = (-(-size * (2 if every["upsample"] else 1) // every["stride"]) for size in (h, w))
        counts = dict(in_channels=packed.in_channels, out_channels=packed.out_channels)
        y = normal(n, k, height, width, seed=7, last=True)
        yield Example("conv2d_out", name, every | counts | dict(y=y, packed=packed.tensor))
