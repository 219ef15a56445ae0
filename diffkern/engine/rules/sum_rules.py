"""Rules that drop no-ops, and merge sums and concatenations into the convolution or norm beside them."""

import torch

from ..graph import Graph, Node
from ..words import words
from .nodes import (
    VIEWS,
    bound,
    calls,
    conv,
    is_call,
    is_float,
    is_ours,
    is_tensor,
    make,
    norm,
    only_user,
    replace,
    shape,
    through,
    uses,
)

NO_OPS = words(
    "contiguous clone detach data to float type_as alias identity expand view reshape flatten",
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout",  # no random one: they are not captured
)
"""Functions that give their input back, if its shape and dtype are those of the result."""


def no_ops(graph: Graph) -> None:
    """Remove calls that return their input: dropout in eval mode, ``x / 1``, ``contiguous``, ``clone``, ``detach``."""
    for node in list(graph):
        if node.kind != "call" or not node.args or not is_tensor(node.args[0]):
            continue
        x, name = node.args[0], node.name
        if not is_tensor(node) or (shape(x), x.dtype) != (shape(node), node.dtype):
            continue
        number = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        by_one = name in ("mul", "div") and isinstance(number, (int, float)) and number == 1
        if by_one or name in NO_OPS:
            replace(node, x)


def added_vectors(graph: Graph) -> None:
    """A vector each sample, added to every pixel that a convolution gives: the time embedding."""
    for node in calls(graph, "add"):
        if len(node.args) != 2 or node.kwargs or not is_float(*node.args):
            continue
        for y, vector in (node.args, node.args[::-1]):
            n, c, *_ = shape(node)
            alone = is_ours(y, conv) and only_user(y) is node and y.args[4] is None and y.args[5] is None
            if alone and shape(vector) == (n, c, 1, 1) and shape(y) == shape(node):
                flat = make(node, torch.reshape, (vector, (-1, c)), (n, c))  # any number of samples
                replace(node, make(node, conv, (*y.args[:4], flat, *y.args[5:]), shape(node)))
                break


def residuals(graph: Graph) -> None:
    """A sum with what a convolution gives, also where views lie between the two."""
    for node in calls(graph, "add"):
        if len(node.args) != 2 or node.kwargs or not is_float(*node.args):
            continue
        for y, other in (node.args, node.args[::-1]):
            if shape(y) != shape(other) or y is other:
                continue
            source, views = y, []
            while is_call(source, *VIEWS) and only_user(source) is not None and is_tensor(source.args[0]):
                views.append(source)
                source = source.args[0]
            if not (is_ours(source, conv) and only_user(source) is not None and source.args[5] is None):
                continue
            if only_user(y) is not node:
                continue
            for view in views:  # back to the convolution's own shape
                other = _turned_back(node, view, other)
                if other is None:
                    break
            if other is None:
                continue
            y = make(node, conv, (*source.args[:5], other, *source.args[6:]), shape(source))
            for view in reversed(views):
                y = make(node, view.target, (y, *view.args[1:]), shape(view), view.kwargs)
            replace(node, y)
            break


def _turned_back(before: Node, view: Node, y: Node) -> Node | None:
    """The view, undone."""
    x = view.args[0]
    if view.name in ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"):
        return make(before, torch.reshape, (y, shape(x)), shape(x))
    sizes = range(2, 2 + len(shape(x)))  # all different, so that they tell where each dimension went
    seen = through([view], torch.empty(*sizes, dtype=torch.float32, device="meta"))
    if seen is None:
        return None
    return make(before, torch.permute, (y, tuple(list(seen.shape).index(size) for size in sizes)), shape(x))


def concatenations(graph: Graph) -> None:
    """Two images side by side, which norms and convolutions read as two."""
    for node in calls(graph, "cat"):
        given = bound(node, "tensors dim", dim=0)
        parts, dim = given.get("tensors"), given.get("dim")
        if len(parts) != 2 or len(shape(node)) != 4 or dim not in (1, -3) or not is_float(*parts):
            continue
        reads = all(
            is_ours(user, norm, conv) and user.args[0] is node and user.args[1] is None and uses(user, node) == 1
            for user in node.users
        )
        if reads:
            for user in list(node.users):
                user.set_args((*parts, *user.args[2:]))
