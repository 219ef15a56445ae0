"""Tensors of the same values in every layout of memory that torch allows."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor


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
