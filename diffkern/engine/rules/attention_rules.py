"""Attention, and the linear layers that give it q, k and v."""

from typing import Any

import torch

from ..graph import Graph, Node
from .nodes import (
    attention,
    bound,
    calls,
    chain,
    conv,
    is_call,
    is_float,
    is_ours,
    make,
    only_user,
    ours,
    replace,
    shape,
)


def attentions(graph: Graph) -> None:
    """``F.scaled_dot_product_attention`` without a mask, and ``ops.attention``."""
    for node in calls(graph, "scaled_dot_product_attention"):
        names = "query key value attn_mask dropout_p is_causal"
        given = bound(node, names, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)
        q, k, v = given["query"], given["key"], given["value"]
        plain = given["attn_mask"] is None and not given["is_causal"] and given["dropout_p"] == 0
        if plain and _is_attention(q, k, v):
            replace(node, make(node, attention, (q, k, v, given["scale"]), shape(node)))
    for node in calls(graph, "attention"):
        y = only_user(node)
        if is_call(y, "item_of") and y.args[1] == 0 and _is_attention(*node.args[:3]):
            replace(y, make(node, attention, node.args, shape(y)))


def _is_attention(q: Node, k: Node, v: Node) -> bool:
    return is_float(q, k, v) and len(shape(q)) == 4 and shape(k) == shape(v) and (
        shape(q)[:2] == shape(k)[:2] and shape(q)[3] == shape(k)[3] and min(shape(q)) > 0 and shape(k)[2] > 0
    )  # fmt: skip


def side_by_side(graph: Graph) -> None:
    """Linear layers of one input that attention gets, q, k and v: one product."""
    groups: dict[Any, list[Node]] = {}
    for node in ours(graph, conv):
        x, skip, weights, biases, add, residual, *_ = node.args
        linear = len(shape(weights[0])) == 2 and (skip, add, residual) == (None, None, None)
        if linear and is_ours(chain(node)[1], attention):
            groups.setdefault((x, biases is None), []).append(node)
    for (x, bare), nodes in groups.items():
        if len(nodes) == 1:
            continue
        weights = tuple(weight for node in nodes for weight in node.args[2])
        biases = None if bare else tuple(bias for node in nodes for bias in node.args[3])
        widths = [shape(node)[1] for node in nodes]
        n, _, *size = shape(nodes[0])
        y = make(nodes[0], conv, (x, None, weights, biases, None, None, 1, 0, False), (n, sum(widths), *size))
        for i, node in enumerate(nodes):
            args = (y, 1, sum(widths[:i]), widths[i])
            replace(node, make(node, torch.narrow, args, shape(node)))
