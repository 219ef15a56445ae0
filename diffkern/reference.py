"""Every op once more in plain NumPy and PyTorch, with the same signature: what the kernels are held against.

The ops that have derivatives are the composites (:mod:`diffkern.composites`), with noise and exp in NumPy.

The noise is the standard of ``docs/noise.md`` word for word: float32 additions, multiplications and square roots,
each rounded once, in the order written here. The kernels give these very bits.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import composites
from .composites import COLUMNS as COLUMNS
from .packing import PackedConv

# --- words -------------------------------------------------------------------------------------------------------


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): uint32 counter [..., 4] and key [..., 2] -> uint32 words [..., 4]."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, np.uint64), -1, 0)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


# --- words -> normals --------------------------------------------------------------------------------------------

# -2 (ln(1+f) - f) / f^2 on [-1/3, 1/3]; sin(pi/2 t) / t and (cos(pi/2 t) - 1) / t^2 on [-1/2, 1/2], both in t^2
LOG = [float.fromhex(h) for h in (
    "0x1.ffffd6p-1", "-0x1.5554fcp-1", "0x1.00144ep-1", "-0x1.99d3b0p-2",
    "0x1.5038e0p-2", "-0x1.1ea898p-2", "0x1.3b0c5cp-2", "-0x1.1f2812p-2")]  # fmt: skip
SIN = [float.fromhex(h) for h in ("0x1.921fb6p+0", "-0x1.4abc24p-1", "0x1.4680a4p-4", "-0x1.33198ep-8")]
COS = [float.fromhex(h) for h in ("-0x1.3bd3a2p+0", "0x1.03b18ep-2", "-0x1.4eb112p-6")]
MINUS_2_LN_2 = np.float32(float.fromhex("-0x1.62e430p+0"))


def _horner(x: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    y = np.float32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + np.float32(c)
    return y


def radius(w: np.ndarray) -> np.ndarray:
    """sqrt(-2 ln u), u = (w + 1/2) 2^-32: uint32 -> float32. Small 1 - u keep full relative accuracy."""
    upper = w >= np.uint32(1 << 31)
    x = (np.where(upper, ~w, w).astype(np.int32).astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    y = np.where(upper, np.float32(1) - x, x)  # u = y, or 1 - x where that is more exact
    i = y.view(np.int32) - np.int32(0x3F2AAAAB)
    e = i >> 23  # u = 2^e (1 + f), 1 + f in [2/3, 4/3)
    f = ((i & np.int32(0x007FFFFF)) + np.int32(0x3F2AAAAB)).view(np.float32) - np.float32(1)
    f = np.where(e == 0, -x, f)
    return np.sqrt(((f * f) * _horner(f, LOG) + f * np.float32(-2)) + e.astype(np.float32) * MINUS_2_LN_2)


def cos_sin(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of w 2^-32 turns: uint32 -> two float32."""
    t = (w << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2**-32)  # quarter turns, [-1/2, 1/2)
    t2 = t * t
    sin, cos = t * _horner(t2, SIN), t2 * _horner(t2, COS) + np.float32(1)
    quarter = (w + np.uint32(1 << 29)) >> np.uint32(30)
    cos, sin = np.where(quarter & 1, sin, cos), np.where(quarter & 1, cos, sin)
    return np.where((quarter + np.uint32(1)) & 2, -cos, cos), np.where(quarter & 2, -sin, sin)


def normals(words: np.ndarray) -> np.ndarray:
    """Four words [..., 4] -> four standard normals [..., 4] (Box & Muller 1958)."""
    r = radius(words[..., 0::2].copy())
    cos, sin = cos_sin(words[..., 1::2].copy())
    return np.stack((r * cos, r * sin), axis=-1).reshape(words.shape)


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
        return ((z * z) * _horner(z, EXP) + z + np.float32(1)) * scale


def _integers(values: int | Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        return values.reshape(-1).tolist()
    return [values] if isinstance(values, int) else list(values)


def noise(
    seeds: int | Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    step: int | Tensor,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """See :func:`diffkern.noise`."""
    device = seeds.device if device is None and isinstance(seeds, Tensor) else device
    seeds = np.array([seed % 2**64 for seed in _integers(seeds)], np.uint64)
    step = np.broadcast_to(np.array(_integers(step), np.uint32), seeds.shape)
    elements = int(np.prod(shape))
    blocks = np.arange(-(-elements // 4), dtype=np.uint64)
    counter = np.empty((len(seeds), len(blocks), 4), np.uint32)
    counter[..., 0], counter[..., 1] = blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32)
    counter[..., 2], counter[..., 3] = step[:, None], stream
    key = np.stack((seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)), axis=-1)[:, None]
    z = normals(philox4x32(counter, key)).reshape(len(seeds), 4 * len(blocks))[:, :elements]
    return torch.from_numpy(z.copy()).reshape(len(seeds), *shape).to(device=device, dtype=dtype)


# --- the ops that have derivatives -------------------------------------------------------------------------------


def _exp(x: Tensor) -> Tensor:
    return torch.from_numpy(exp(x.cpu().numpy())).to(x.device)


q_sample = functools.partial(composites.q_sample, noise=noise)
reverse_step = functools.partial(composites.reverse_step, noise=noise, exp=_exp)
noise_loss = functools.partial(composites.noise_loss, noise=noise)
group_norm_silu = composites.group_norm_silu
conv3x3 = composites.conv3x3
attention = composites.attention

# --- convolution for inference -----------------------------------------------------------------------------------

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.25, -1.25)}
"""Where Winograd's polynomials are evaluated, and at infinity; for tiles of 4 these make half the error of 1 and 2."""


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


def pack_taps(weight: Tensor) -> PackedConv:
    """See :func:`diffkern.ops.pack_taps`."""
    out_channels, in_channels, kernel, _ = weight.shape
    blocks = F.pad(weight.detach().flatten(2), (0, 0, 0, 0, 0, -len(weight) % 32)).unflatten(0, (-1, 32))
    return PackedConv(blocks.permute(0, 2, 3, 1).contiguous(), in_channels, out_channels, kernel)


def expand_taps(taps: PackedConv) -> PackedConv:
    """See :func:`diffkern.ops.expand_taps`."""
    _, G, _ = winograd(4, taps.tensor)
    matrices = torch.einsum("it,bctk->ibck", torch.kron(G, G), taps.tensor)
    matrices = F.pad(matrices, (0, 0, 0, 0, 0, len(taps.tensor) % 2))
    return dataclasses.replace(taps, tensor=matrices.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3).contiguous())


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
