"""Conditions: what a network gets beside x_t and t, by name, each with the value that stands for its absence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .images import from_pixels


@dataclass(frozen=True, eq=False)
class Condition:
    """A tensor [N, *shape] that the network gets as a keyword of this name.

    null    what stands for its absence: a number, or a tensor of that shape; None where a network must have it
    encode  makes the tensor from what a caller gives, such as a text: a callable, or None for tensors alone
    """

    name: str
    shape: tuple[int, ...]
    null: float | Tensor | None = None
    encode: Callable[[Any], Tensor] | None = None

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Condition):
            return NotImplemented
        nulls = [
            None if null is None else torch.as_tensor(null, dtype=torch.float32, device="cpu")
            for null in (self.null, other.null)
        ]
        same = nulls[0] is nulls[1] or (None not in (self.null, other.null) and torch.equal(*nulls))
        return same and (self.name, self.shape, self.encode) == (other.name, other.shape, other.encode)

    def __hash__(self) -> int:
        return hash((self.name, self.shape))

    def batch(self, value: Any, n: int) -> Tensor:
        """The condition for n samples, from one for each or one for all: float32 [n, *shape].

        The bytes of an image [C, H, W] are pixels, which become [-1, 1]; a number will do where the shape is ().
        """
        if value is None:
            if self.null is None:
                raise ValueError(f"{self.name}: expected a value, for the network has none that stands for its absence")
            return torch.as_tensor(self.null, dtype=torch.float32, device="cpu").expand(n, *self.shape).clone()
        if not self.shape and isinstance(value, int | float) and not isinstance(value, bool):
            value = torch.tensor(value, dtype=torch.float32, device="cpu")
        if not isinstance(value, Tensor):
            if self.encode is None:
                raise TypeError(f"{self.name}: expected a tensor, got {type(value).__name__}")
            value = self.encode(value)
        if value.shape == self.shape:
            value = value.expand(n, *self.shape)
        if tuple(value.shape) != (n, *self.shape):
            raise ValueError(f"{self.name}: expected shape {(n, *self.shape)}, got {tuple(value.shape)}")
        pixels = value.dtype == torch.uint8 and len(self.shape) == 3
        return from_pixels(value) if pixels else value.to(torch.float32)
