"""Constraints on a run: a range for x0_hat, a known part of the image, a start inside the run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .process import checked_count, checked_float


@dataclass(frozen=True)
class Quantile:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): divide x0_hat by this quantile of its absolute value,
    for each sample, where that is above 1, and clamp it to [-1, 1]."""

    q: float = 0.995

    def __post_init__(self) -> None:
        checked_float("q", self.q, "a number in (0, 1]", lambda q: 0 < q <= 1)


def limit_of(clip: Any) -> float | None:
    """The limit that ``clip`` sets: True is 1, False none; a number, or a range (-a, a), is its own."""
    if isinstance(clip, bool):
        return 1.0 if clip else None
    if isinstance(clip, Quantile):
        return 1.0
    if isinstance(clip, tuple | list) and len(clip) == 2 and clip[0] == -clip[1]:
        clip = clip[1]
    if isinstance(clip, tuple | list):
        raise ValueError(f"clip: expected a range (-a, a), got {clip!r}")
    expected = "True, False, a number > 0, a range (-a, a) or a Quantile"
    return checked_float("clip", clip, expected, lambda value: value > 0)


@dataclass(frozen=True, eq=False)
class Inpaint:
    """Make the masked part of an image and keep the rest, which is blended in at its noise level after every step.

    x         [N or 1, ...], the image; known where the mask is 0
    mask      [N or 1, C or 1, ...], 1 or True where to make something new
    resample  how often each stretch of ``jump`` steps is gone through (RePaint, Lugmayr et al. 2022); 1: once
    jump      the steps of a stretch
    """

    x: Tensor
    mask: Tensor
    resample: int = 1
    jump: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.mask, Tensor) and self.mask.dtype == torch.bool:
            object.__setattr__(self, "mask", self.mask.float())  # past ``frozen``
        for name in ("x", "mask"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        for name in ("resample", "jump"):
            checked_count(name, getattr(self, name))
        if not ((self.mask >= 0) & (self.mask <= 1)).all():
            raise ValueError(f"mask: expected values in [0, 1], got {self.mask.min():.3g} to {self.mask.max():.3g}")


@dataclass(frozen=True, eq=False)
class From:
    """Begin inside a run, from an image that is noised to there (SDEdit, Meng et al. 2022).

    x         [N or 1, ...], the image
    fraction  in (0, 1]: of the steps that are left to do; 1 keeps next to nothing of x
    """

    x: Tensor
    fraction: float = 0.6

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor) or not self.x.is_floating_point():
            got = self.x.dtype if isinstance(self.x, Tensor) else type(self.x).__name__
            raise TypeError(f"x: expected a floating-point tensor, got {got}")
        checked_float("fraction", self.fraction, "a number in (0, 1]", lambda value: 0 < value <= 1)


def rows_of(name: str, x: Tensor, n: int, shape: tuple[int, ...]) -> Tensor:
    """``x`` [1 or n, ...] of a shape that broadcasts to a sample's, for n samples."""
    fits = x.ndim == len(shape) + 1 and x.shape[0] in (1, n)
    if not fits or any(size not in (1, wanted) for size, wanted in zip(x.shape[1:], shape, strict=True)):
        raise ValueError(f"{name}: expected shape ({n}, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    return x.to(torch.float32).expand(n, *x.shape[1:])
