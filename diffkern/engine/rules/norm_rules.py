"""Group norms, and the scale, shift and SiLU behind them."""

from typing import Any

import torch

from ..graph import Graph, Node
from .nodes import (
    bound,
    calls,
    chain,
    is_call,
    is_call_of_any,
    is_float,
    is_static,
    make,
    norm,
    only_user,
    ours,
    replace,
    shape,
)


def group_norms(graph: Graph) -> None:
    """``F.group_norm``, and ``ops.group_norm_silu`` with all that it does besides."""
    for node in calls(graph, "group_norm"):
        given = bound(node, "input num_groups weight bias eps", weight=None, bias=None, eps=1e-5)
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if weight is None or bias is None or not is_static(weight, bias) or not is_float(x):
            continue
        groups, eps = given["num_groups"], given["eps"]
        if len(shape(x)) == 4:
            replace(node, make(node, norm, (x, None, weight, bias, groups, eps, None, False), shape(x)))
        elif len(shape(x)) == 3:
            n, c, tokens = shape(x)
            image = make(node, torch.unsqueeze, (x, 2), (n, c, 1, tokens))
            y = make(node, norm, (image, None, weight, bias, groups, eps, None, False), shape(image))
            replace(node, make(node, torch.squeeze, (y, 2), shape(x)))
    for node in calls(graph, "group_norm_silu"):
        x, weight, bias, groups, eps, scale_shift, add, residual, silu = node.args
        y = only_user(node)
        if not (is_call(y, "item_of") and y.args[1] == 0 and len(shape(x)) == 4):
            continue
        if not (is_static(weight, bias) and is_float(x)):
            continue
        if add is not None:
            vector = make(node, torch.reshape, (add, (-1, shape(x)[1], 1, 1)), (*shape(x)[:2], 1, 1))
            x = make(node, torch.add, (x, vector), shape(x))
        new = make(node, norm, (x, None, weight, bias, groups, eps, scale_shift, silu), shape(x))
        if residual is not None:
            new = make(node, torch.add, (new, residual), shape(x))
        replace(y, new)


def scale_shifts(graph: Graph) -> None:
    """``norm(x) * (1 + scale) + shift``, of one vector each sample."""
    for node in ours(graph, norm):
        product = only_user(node)
        if node.args[6] is not None or node.args[7] or not _of_two(product, "mul", node):
            continue
        slope = _other(product, node)
        total = only_user(product)
        if not (is_call_of_any(slope, "add") and _of_two(total, "add", product)):
            continue
        ones = [value for value in slope.args if not isinstance(value, Node) and value == 1]
        scales = [value for value in slope.args if isinstance(value, Node)]
        shift = _other(total, product)
        n, c = shape(node)[:2]
        if len(slope.args) != 2 or slope.kwargs or len(ones) != 1 or len(scales) != 1:
            continue
        if not is_float(*scales, shift) or any(shape(vector) != (n, c, 1, 1) for vector in (*scales, shift)):
            continue
        flat = [make(total, torch.reshape, (vector, (-1, c)), (n, c)) for vector in (*scales, shift)]
        both = make(total, torch.cat, (flat, 1), (n, 2 * c))
        replace(total, make(total, norm, (*node.args[:6], both, False), shape(node)))


def _of_two(node: Any, name: str, one: Node) -> bool:
    """Is it the sum or product of ``one`` and another tensor?"""
    return is_call(node, name) and len(node.args) == 2 and not node.kwargs and is_float(*node.args) and one in node.args


def _other(node: Node, one: Node) -> Node:
    a, b = node.args
    return b if a is one else a


def silus(graph: Graph) -> None:
    """SiLU behind a group norm."""
    for node in ours(graph, norm):
        y = only_user(node)
        if not node.args[7] and is_call(y, "silu") and shape(y) == shape(node):
            replace(y, make(y, norm, (*node.args[:7], True), shape(node)))
            continue
        views, y = chain(node)
        if not node.args[7] and views and is_call(y, "silu"):  # behind the views of a norm over tokens
            new = make(views[0], norm, (*node.args[:7], True), shape(node))
            views[0].replace_input(node, new)
            replace(y, views[-1])
