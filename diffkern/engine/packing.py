"""Which kernel a convolution takes, and its weight as that kernel reads it.

Problem -> plan_conv -> the way to pack the weight -> Store, where every recording of a network finds it
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, ops
from ..ops import PackedConv

FEW_TILES = 64  # with at most this many 4x4 tiles in a batch, make Winograd's matrices from the taps as they are used
FEW_CHANNELS = 4  # with this few channels, use the direct kernel
DEEP = 256  # from this many in_channels * taps on, three bfloat16 parts are faster than float32, at batch 1 too


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution of a batch. terms: bfloat16 parts of a factor that products may be made of, None for float32."""

    samples: int
    channels: int
    out_channels: int
    height: int  # of the output, as width
    width: int
    kernel: int
    stride: int
    padding: int
    upsample: bool
    terms: int | None

    @property
    def few(self) -> bool:
        return min(self.channels, self.out_channels) <= FEW_CHANNELS

    @property
    def winograd(self) -> bool:
        """By F(4x4, 3x3) in float32? Terms that are as exact are not as fast at it."""
        fits = self.kernel == 3 and self.stride == self.padding == 1 and not self.few
        return fits and self.terms in (None, 3)

    @property
    def by_terms(self) -> bool:
        """By products of bfloat16?"""
        if self.winograd:
            return False
        deep = self.channels * self.kernel**2 >= DEEP
        return self.terms == 1 or (not self.few and (self.terms == 2 or (self.terms == 3 and deep)))

    @property
    def tiles(self) -> int:
        return self.samples * -(-self.height // 4) * -(-self.width // 4)


def plan_conv(problem: Problem) -> Callable[[Tensor], PackedConv]:
    """The function that packs the weight [K, C, k, k] for the kernel that ``problem`` takes.

    The kernels for taps and for matrices give the same bits, so that the batch size, which chooses between the two,
    changes none.
    """
    if problem.winograd:
        return ops.pack_taps if problem.tiles <= FEW_TILES else _pack_matrices
    if problem.by_terms:
        return _by_terms(problem.terms, problem.upsample and problem.kernel == 3)
    return ops.pack_conv


def _pack_matrices(weight: Tensor) -> PackedConv:
    return ops.expand_taps(ops.pack_taps(weight))


@functools.cache
def _by_terms(terms: int, upsampling: bool) -> Callable[[Tensor], PackedConv]:
    return functools.partial(ops.pack_upsampling if upsampling else ops.pack_conv, terms=terms)


def terms_of(dtype: torch.dtype) -> int | None:
    """How many numbers of bfloat16 a factor of a product is the sum of (``ops.pack_conv``); None if it is a float."""
    if dtype == torch.bfloat16:
        return 1
    if _C.cpu_level() != "avx512_amx":
        return None
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


class Store:
    """A network's packed weights. One lives as long as a recording uses it, and serves all recordings that need it."""

    def __init__(self) -> None:
        self._packed: weakref.WeakValueDictionary[Hashable, PackedConv] = weakref.WeakValueDictionary()

    def packed(self, weights: Sequence[Tensor], pack: Callable[[Tensor], PackedConv]) -> PackedConv:
        """The weights [K, C, k, k] or [K, C], side by side."""
        key: Any = (*(_place(weight) for weight in weights), pack)
        packed = self._packed.get(key)
        if packed is None:
            weight, *others = [weight.detach() for weight in weights]
            weight = torch.cat([weight, *others]) if others else weight
            packed = pack(weight if weight.ndim == 4 else weight[:, :, None, None])
            self._packed[key] = packed
        return packed


def _place(weight: Tensor) -> Hashable:
    """Return a weight's address, shape and strides. Its values are the watch's matter: new ones get another store."""
    return weight.data_ptr(), tuple(weight.shape), weight.stride()
