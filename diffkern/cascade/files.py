"""The networks of a cascade in one safetensors file, with one description."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model import load_part
from ..system import FORMAT, described, numbers_of

if TYPE_CHECKING:
    from .system import Cascade

KIND = "cascade"
NUMBERS = ("guidance", "steps", "augmentation")
MOST_PARTS = 16


def describe(system: "Cascade") -> dict[str, Any]:
    """All but the weights, as JSON holds it."""
    numbers = {name: getattr(system, name) for name in NUMBERS}
    return {"system": KIND, "format": FORMAT, "name": system.name, **numbers, **described(system.models())}


def read(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike, device: torch.device
) -> "Cascade":
    """The system of a file. Raises TypeError or ValueError for whatever no diffkern has written."""
    from .system import Cascade

    numbers = numbers_of(description, NUMBERS)
    names = [part_name(part) for part in range(MOST_PARTS) if part == 0 or part_name(part) in description]
    base, *upsamplers = (load_part(description, name, tensors, path, device) for name in names)
    return Cascade(base, tuple(upsamplers), name=str(description.get("name", KIND)), **numbers)


def part_name(part: int) -> str:
    """The name of a part in a file."""
    return f"upsampler_{part}" if part else "base"
