"""Systems: several models that draw together, as one object and one file."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .io.files import state, write
from .ops.seeds import as_seeds
from .philox import words
from .process import checked_count

if TYPE_CHECKING:
    from .model import Model

FORMAT = 1
"""The version of a system's file."""

PART_STREAM, PART_STEP = 8, 3 << 30
"""The Philox stream of the seeds of a system's parts; part j >= 1 has the step PART_STEP + j."""


class System(ABC):
    """A system of models, which ``sample``, ``interpolate`` and the command line take in place of a ``Model``.

    steps, guidance  what it draws with, unless told otherwise
    augmentation     of the pictures that its stages are given
    """

    steps: int
    guidance: float
    augmentation: int

    @property
    def stages(self) -> "Mapping[int, Model]":
        """The models that enlarge its pictures, in their order, each by the number of the part that it is."""
        return {}

    @property
    @abstractmethod
    def drawn(self) -> "Model":
        """The model of what the system draws: its shape, its schedule, its device."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Return all networks, by the name of the part, which prefixes their tensors in a file."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return all but the weights, as JSON holds it: "system", its kind, "format", and the parts by name."""

    @abstractmethod
    def sample(self, n: int | None = None, **options: Any) -> Tensor:
        """Draw n samples; the options are those of :func:`diffkern.sample`, and the system's own."""

    @abstractmethod
    def interpolate(self, a: Any, b: Any, n: int, *, seed: int, **options: Any) -> Tensor:
        """Draw n samples that lead from ``a`` to ``b``, all with the noise of one seed."""

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
        """Write the file that :func:`diffkern.load` reads, the weights as ``dtype``.

        Raises ValueError for weights that are not finite in it.
        """
        tensors = {
            f"{part}.{key}": tensor.to(dtype) if tensor.is_floating_point() else tensor
            for part, network in self.networks().items()
            for key, tensor in state(network).items()
        }
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"model: expected weights that are finite in {dtype}, got others in {key}")
        write(path, self.description(), tensors)


def described(parts: "Mapping[str, Model]") -> dict[str, Any]:
    """The descriptions of models that are parts of a system, by name."""
    return {name: model.description() | {"prefix": f"{name}."} for name, model in parts.items()}


def numbers_of(description: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """The numbers of those names in a description. Raises TypeError for anything else."""
    numbers = {name: description.get(name) for name in names}
    for name, value in numbers.items():
        if type(value) not in (int, float):
            raise TypeError(f"{name}: expected a number, got {value!r:.80}")
    return numbers


def part_seeds(seeds: Tensor, part: int) -> Tensor:
    """The seeds by which a part of a system draws, [N] int64: part 0 has ``seeds`` themselves.

    Two parts that drew by the same seeds would share their noise.
    """
    if part == 0:
        return seeds
    drawn = words(seeds.numpy().view(np.uint64), PART_STEP + part, PART_STREAM, 0)
    return torch.from_numpy((drawn[:, 0] | drawn[:, 1] << np.uint64(32)).view(np.int64))


def seeds_of(n: int | None, seeds: Any) -> Tensor:
    """The seed of each sample, int64 [n]: 0..n-1 unless they are given; one sample where neither is."""
    if seeds is None:
        return torch.arange(checked_count("n", 1 if n is None else n), dtype=torch.int64, device="cpu")
    seeds = as_seeds(seeds, "cpu")
    if n is not None and len(seeds) != n:
        raise ValueError(f"seeds: expected {n}, one for each picture, got {len(seeds)}")
    return seeds
