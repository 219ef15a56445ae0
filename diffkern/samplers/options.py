"""Checks of samplers' options: each names the option, what was expected and what came."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..process import checked_float


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float in [low, high]."""
    bounds = f"[{low:g}, {high:g}]" if high < math.inf else f"[{low:g}, inf)"
    expected = f"a number in {bounds}" if low > -math.inf or high < math.inf else "a number"
    return checked_float(name, value, expected, lambda number: low <= number <= high)


def one_of(name: str, value: Any, names: Iterable[Any], otherwise: str = "") -> Any:
    """``value``, which is one of those names."""
    names = tuple(names)
    if not isinstance(value, str | int) or isinstance(value, bool) or value not in names:
        raise ValueError(f"{name}: expected one of {names}{otherwise}, got {value!r}")
    return value


def variances(value: Any, steps: int) -> list[float]:
    """One finite variance >= 0 for each step."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if value.shape != (steps,):
        raise ValueError(f"variance: expected shape ({steps},), one for each step, got {tuple(value.shape)}")
    value = value.detach().to("cpu", torch.float64)
    if not (value.isfinite() & (value >= 0)).all():
        raise ValueError(f"variance: expected finite variances >= 0, got {value.tolist()}")
    return value.tolist()
