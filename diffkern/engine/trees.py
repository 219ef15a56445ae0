"""Arguments as trees of tuples, lists, dictionaries and slices. Those of calls are small and many: this is faster than
``torch.utils._pytree``, which knows every class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NESTS = (tuple, list, dict, slice)


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of ``tree`` in order: the items that are no tuple, list, dict or slice."""
    if isinstance(tree, (tuple, list)):
        return [leaf for item in tree for leaf in (leaves_of(item) if isinstance(item, _NESTS) else (item,))]
    if isinstance(tree, dict):
        return leaves_of(list(tree.values()))
    return leaves_of((tree.start, tree.stop, tree.step)) if isinstance(tree, slice) else [tree]


def mapped(of: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``of`` of each leaf, in order."""
    if isinstance(tree, (tuple, list)):
        items = [mapped(of, item) for item in tree]
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, dict):
        return {key: mapped(of, value) for key, value in tree.items()}
    if isinstance(tree, slice):
        return slice(*(mapped(of, part) for part in (tree.start, tree.stop, tree.step)))
    return of(tree)


def masks(index: Any) -> bool:
    """Does an index choose by True and False?"""
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in leaves_of(index))
