"""Arguments as trees of tuples, lists, dictionaries and slices. Those of calls are small and many: this is faster than
``torch.utils._pytree``, which knows every class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NESTS = (tuple, list, dict, slice)


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of ``tree`` in order: the items that are no tuple, list, dict or slice."""
    leaves: list[Any] = []
    _gather(tree, leaves)
    return leaves


def _gather(tree: Any, leaves: list[Any]) -> None:
    if not isinstance(tree, _NESTS):
        leaves.append(tree)
        return
    if isinstance(tree, slice):
        tree = tree.start, tree.stop, tree.step
    for item in tree.values() if isinstance(tree, dict) else tree:
        _gather(item, leaves)


def mapped(of: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``of`` of each leaf, in order."""
    if not isinstance(tree, _NESTS):
        return of(tree)
    if isinstance(tree, (tuple, list)):
        items = [mapped(of, item) for item in tree]
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, dict):
        return {key: mapped(of, value) for key, value in tree.items()}
    return slice(*(mapped(of, part) for part in (tree.start, tree.stop, tree.step)))


def masks(index: Any) -> bool:
    """Does an index choose by True and False?"""
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in leaves_of(index))
