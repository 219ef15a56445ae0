"""A network's inputs besides x_t, t and labels: by name, each with a shape that says how it enters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..process import checked_int
from .blocks import TimestepEmbedding, timestep_embedding

Shapes = Mapping[str, Sequence[int]]
RANKS = (0, 1, 3)  # a number, a vector, an image
TAKEN = {
    "x_t", "t", "model", "n", "seeds", "labels", "sampler", "steps", "guidance", "clip", "start", "constraint", "noise",
    "callback", "run", "spacing", "x_T", "schedule", "prediction", "shape", "batch_size", "device", "dtype", "engine",
    "cuda_graph", "progress",
}  # fmt: skip
"""Arguments of networks and of ``sample``, which no condition can be called."""


def checked_conditions(conditions: Any) -> dict[str, tuple[int, ...]]:
    """``conditions`` by name as tuples, {} for None. Raises TypeError or ValueError for what is no such table."""
    if not isinstance(conditions or {}, Mapping):
        raise TypeError(f"conditions: expected a shape by name, got {conditions!r}")
    expected, found = "(), (D,) or (C, H, W) of positive ints", {}
    for name, shape in (conditions or {}).items():
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN or hasattr(nn.ModuleDict, name):
            raise ValueError(f"conditions: expected names that no argument of sample and no module has, got {name!r}")
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise TypeError(f"conditions: expected {expected} as {name}, got {shape!r}")
        sizes = tuple(checked_int("conditions", size, f"{expected} as {name}") for size in shape)
        if len(sizes) not in RANKS or min(sizes, default=1) < 1:
            raise ValueError(f"conditions: expected {expected} as {name}, got {shape}")
        found[name] = sizes
    return found


def check_conditions(given: Mapping[str, Any], shapes: Shapes, n: int) -> None:
    """TypeError or ValueError unless ``given`` are [n, *shape] tensors of those names."""
    for name in given:
        if name not in shapes:
            raise TypeError(f"{name}: expected one of the network's conditions ({', '.join(shapes) or 'none'})")
    for name, shape in shapes.items():
        value = given.get(name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if tuple(value.shape) != (n, *shape):
            raise ValueError(f"{name}: expected shape {(n, *shape)}, got {tuple(value.shape)}")


def condition_embeddings(shapes: Shapes, channels: int, dim: int) -> nn.ModuleDict:
    """The layers by which numbers and vectors enter an embedding of ``dim``; ``channels`` are a number's sinusoids."""
    widths = {name: shape[0] if shape else channels for name, shape in shapes.items() if len(shape) < 2}
    return nn.ModuleDict({name: TimestepEmbedding(width, dim) for name, width in widths.items()})


def embedded(layers: nn.ModuleDict, given: Mapping[str, Tensor], channels: int, dtype: torch.dtype) -> Tensor:
    """The sum of what numbers and vectors make: [N, dim], or 0 where there are none."""
    found = 0
    for name, layer in layers.items():
        value = given[name] if given[name].ndim > 1 else timestep_embedding(given[name], channels)
        found = found + layer(value.to(dtype))
    return found
