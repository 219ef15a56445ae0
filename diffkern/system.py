"""Systems: several models that draw together, as one object and one file."""

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .philox import words

if TYPE_CHECKING:
    from .model import Model

PART_STREAM, PART_STEP = 8, 3 << 30
"""The Philox stream of the seeds of a system's parts; part j >= 1 has the step PART_STEP + j."""


class System(ABC):
    """A system of models, which ``sample``, ``interpolate`` and the command line take in place of a ``Model``.

    steps, guidance  what it draws with, unless told otherwise
    """

    steps: int
    guidance: float

    @property
    @abstractmethod
    def drawn(self) -> "Model":
        """The model of what the system draws: its shape, its schedule, its device."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Return all networks, by the prefix of their tensors in a file."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return all but the weights, as JSON holds it."""

    @abstractmethod
    def sample(self, n: int | None = None, **options: Any) -> Tensor:
        """Draw n samples; the options are those of :func:`diffkern.sample`, and the system's own."""

    @abstractmethod
    def save(self, path: str | os.PathLike, dtype: torch.dtype) -> None:
        """Write the file that :func:`diffkern.load` reads, the weights as ``dtype``."""

    @abstractmethod
    def interpolate(self, a: Any, b: Any, n: int, *, seed: int, **options: Any) -> Tensor:
        """Draw n samples that lead from ``a`` to ``b``, all with the noise of one seed."""


def part_seeds(seeds: Tensor, part: int) -> Tensor:
    """The seeds by which ``part`` >= 1 of a system draws, [N] int64: part 0 has ``seeds`` themselves.

    Two parts that drew by the same seeds would share their noise.
    """
    drawn = words(seeds.numpy().view(np.uint64), PART_STEP + part, PART_STREAM, 0)
    return torch.from_numpy((drawn[:, 0] | drawn[:, 1] << np.uint64(32)).view(np.int64))
