"""Tensors of the same values in every layout of memory that torch allows."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffkern.ops.example import Example


def laid_out(tensor: Tensor, order: Sequence[int], steps: Sequence[int], offset: int) -> Tensor:
    """Equal to ``tensor``; in memory its dimensions lie in this order, each with a gap of ``steps - 1``."""
    sizes = [tensor.shape[d] * step for d, step in zip(order, steps, strict=True)]
    beside = torch.nan if tensor.is_floating_point() else -1
    memory = torch.full((offset + math.prod(sizes),), beside, dtype=tensor.dtype)
    view = memory[offset:].view(sizes)[tuple(slice(None, None, step) for step in steps)]
    view = view.permute([list(order).index(d) for d in range(tensor.ndim)])
    view.copy_(tensor)
    return view


def layouts(dims: int) -> st.SearchStrategy[dict]:
    """Arguments of :func:`laid_out` for a tensor of so many dimensions."""
    return st.fixed_dictionaries(
        {
            "order": st.permutations(range(dims)),
            "steps": st.lists(st.integers(1, 3), min_size=dims, max_size=dims),
            "offset": st.integers(0, 3),
        }
    )


def shapes(min_dims: int = 1, max_dims: int = 5) -> st.SearchStrategy[list[int]]:
    """[N, ...], often with sizes of 0 and 1."""
    return st.lists(st.integers(0, 9), min_size=min_dims, max_size=max_dims)


def unaligned(x: Tensor) -> Tensor:
    """One element past an aligned start."""
    return torch.cat([x.flatten(), x.new_zeros(1)]).roll(1)[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "unaligned": unaligned,
    "transposed": lambda x: x.mT.contiguous().mT,
}
"""The same images, as they may lie in memory."""


def arranged(example: Example, layout: Callable[[Tensor], Tensor]) -> Example:
    """The same call with every image in that layout."""

    def lay_out(value: Any) -> Any:
        return [layout(one) for one in value] if isinstance(value, list) else value if value is None else layout(value)

    given = {name: lay_out(example.arguments[name]) for name in example.images if name in example.arguments}
    return dataclasses.replace(example, arguments=example.arguments | given)
