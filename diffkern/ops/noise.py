"""Standard normals by address."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..philox import philox4x32
from .arguments import as_device, as_index
from .example import DTYPES, Example, label, one, steps
from .example import seeds as example_seeds
from .registration import Op, native, same_device
from .seeds import Seeds, as_seeds
from .transforms import by_torch

op = Op("noise")


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
    stream  what the noise is for: 0 the initial x_T, 1 reverse steps, 2 forward noising. 3 to 8 have other uses
            (docs/noise.md); from 9 on they are free
    dtype   float32, or bfloat16 or float16: the float32 value rounded once; in ``torch_ops`` also float64, unrounded
    device  where to; None is the seeds' own

    Philox4x32-10 (Salmon et al. 2011) and Box-Muller from 32-bit uniforms, |z| up to 6.76.
    """
    seeds = as_seeds(seeds, None if device is None else as_device(device))
    shape = [shape] if isinstance(shape, int) else shape
    arguments = (seeds, shape, as_index("step", step, seeds.device), stream, dtype)
    op.check(arguments)
    return composite(*arguments) if by_torch() else op(*arguments)


@torch.library.register_fake("diffkern::noise")
def _(seeds, shape, step, stream, dtype):
    same_device(seeds, step=step)
    return seeds.new_empty([seeds.shape[0], *shape], dtype=dtype)


@functools.partial(torch.library.register_vmap, "diffkern::noise")
def _(info, in_dims, seeds, shape, step, stream, dtype):
    """The samples of all batches side by side."""
    of_seeds, _, of_step, *_ = in_dims
    seeds = seeds.expand(info.batch_size, -1) if of_seeds is None else seeds.movedim(of_seeds, 0)
    step = step.expand(info.batch_size, *step.shape) if of_step is None else step.movedim(of_step, 0)
    step = step.reshape(info.batch_size, -1).expand(seeds.shape)
    z = native.noise(seeds.flatten(), shape, step.flatten(), stream, dtype)
    return z.unflatten(0, seeds.shape), 0


# --- composite ---------------------------------------------------------------------------------------------------


def composite(
    seeds: Tensor, shape: Sequence[int], step: Tensor, stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The kernel's, in any dtype: a constant to every derivative."""
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    return native.noise(seeds, shape, step, stream, kernel_dtype).to(dtype)


# --- reference ---------------------------------------------------------------------------------------------------


# -2 (ln(1+f) - f) / f^2 on [-1/3, 1/3]; sin(pi/2 t) / t and (cos(pi/2 t) - 1) / t^2 on [-1/2, 1/2], both in t^2
LOG = [float.fromhex(h) for h in (
    "0x1.ffffd6p-1", "-0x1.5554fcp-1", "0x1.00144ep-1", "-0x1.99d3b0p-2",
    "0x1.5038e0p-2", "-0x1.1ea898p-2", "0x1.3b0c5cp-2", "-0x1.1f2812p-2")]  # fmt: skip
SIN = [float.fromhex(h) for h in ("0x1.921fb6p+0", "-0x1.4abc24p-1", "0x1.4680a4p-4", "-0x1.33198ep-8")]
COS = [float.fromhex(h) for h in ("-0x1.3bd3a2p+0", "0x1.03b18ep-2", "-0x1.4eb112p-6")]
MINUS_2_LN_2 = np.float32(float.fromhex("-0x1.62e430p+0"))


def horner(x: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
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
    return np.sqrt(((f * f) * horner(f, LOG) + f * np.float32(-2)) + e.astype(np.float32) * MINUS_2_LN_2)


def cos_sin(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of w 2^-32 turns: uint32 -> two float32."""
    t = (w << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2**-32)  # quarter turns, [-1/2, 1/2)
    t2 = t * t
    sin, cos = t * horner(t2, SIN), t2 * horner(t2, COS) + np.float32(1)
    quarter = (w + np.uint32(1 << 29)) >> np.uint32(30)
    cos, sin = np.where(quarter & 1, sin, cos), np.where(quarter & 1, cos, sin)
    return np.where((quarter + np.uint32(1)) & 2, -cos, cos), np.where(quarter & 2, -sin, sin)


def normals(words: np.ndarray) -> np.ndarray:
    """Four words [..., 4] -> four standard normals [..., 4] (Box & Muller 1958)."""
    r = radius(words[..., 0::2].copy())
    cos, sin = cos_sin(words[..., 1::2].copy())
    return np.stack((r * cos, r * sin), axis=-1).reshape(words.shape)


def _integers(values: int | Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        return values.reshape(-1).tolist()
    return [values] if isinstance(values, int) else list(values)


def reference(
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


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 3, c: int = 3, h: int = 7, w: int = 11) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    arguments = dict(seeds=example_seeds(n), shape=(c, h, w), step=one(0))
    yield Example("noise", "one step", arguments)
    for dtype in DTYPES:
        yield Example("noise", label(dtype), arguments | dict(step=steps(n, 499), stream=2, dtype=dtype))
