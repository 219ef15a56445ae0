"""Seeds of samples, as the kernels take them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .arguments import dense

Seeds = int | Sequence[int] | np.ndarray | Tensor


def as_seeds(seeds: Seeds, device: torch.device | str | None = None) -> Tensor:
    """Seeds as the kernels take them: int64 [N]. One int means N = 1; ints of [-2^63, 2^64) are taken modulo 2^64."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim > 1:
            raise TypeError(f"seeds: expected an int64 tensor [N], got {seeds.dtype} of shape {tuple(seeds.shape)}")
        seeds = seeds if seeds.ndim == 1 and seeds.is_contiguous() else dense("seeds", seeds.reshape(-1))
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
