"""Nodes of a graph: our kernels' calls, what rules ask of nodes, and how they put others in their place.

A node's role says what it depends on: "static" on weights alone, "small" on time steps and labels besides, "main" on
images. Rules look at main nodes; the weights that they take are static.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from ..functions import name_of
from ..words import words

Node = fx.Node


def conv(x, skip, weights, biases, add, residual, stride, padding, upsample):
    """``ops.conv2d`` by the weights [K, C, k, k] or [K, C] side by side. add: [N, K]."""


def norm(x, skip, weight, bias, groups, eps, scale_shift, silu):
    """``ops.group_norm_silu`` of x and skip side by side. scale_shift: [N, 2C]."""


def attention(q, k, v, scale):
    """``ops.attention``."""


OURS = (conv, norm, attention)


VIEWS = words(
    "view reshape transpose permute flatten unflatten unsqueeze squeeze swapaxes swapdims movedim moveaxis mT T t",
)
"""Functions that only say anew how elements are counted, so that they can be turned back."""


def assign_roles(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "placeholder":
            shape = node.meta["shape"]
            node.meta["role"] = "small" if len(shape) <= 1 else "main"
        elif node.op != "output":
            node.meta["role"] = _role(node.all_input_nodes)


def _role(inputs: Iterable[Node]) -> str:
    roles = {node.meta["role"] for node in inputs}
    return "main" if "main" in roles else "small" if "small" in roles else "static"


def is_call(node: Any, *names: str) -> bool:
    """A main node that calls a function of one of these names?"""
    called = isinstance(node, Node) and node.op in ("call_function", "call_method") and node.meta["role"] == "main"
    return called and node.target not in OURS and name_of(node.target) in names


def is_call_of_any(node: Any, *names: str) -> bool:
    """As ``is_call``, for a node of any role."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and name_of(node.target) in names


def is_ours(node: Any, *targets: Callable) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def calls(graph: fx.Graph, *names: str) -> Iterator[Node]:
    """As they are now: rules change the graph."""
    return (node for node in list(graph.nodes) if not node._erased and is_call(node, *names))


def ours(graph: fx.Graph, *targets: Callable) -> Iterator[Node]:
    return (node for node in list(graph.nodes) if not node._erased and is_ours(node, *targets))


def shape(node: Node) -> tuple[int, ...]:
    return node.meta["shape"]


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("dtype"), torch.dtype)


def is_float(*nodes: Any) -> bool:
    return all(is_tensor(node) and node.meta["dtype"] == torch.float32 for node in nodes)


def is_static(*nodes: Any) -> bool:
    return all(is_float(node) and node.meta["role"] == "static" for node in nodes if node is not None)


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def uses(user: Node, node: Node) -> int:
    count = 0

    def visit(one: Node) -> Node:
        nonlocal count
        count += one is node
        return one

    fx.map_arg((user.args, user.kwargs), visit)
    return count


def bound(node: Node, names: str, **defaults: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**defaults, **dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def make(before: Node, target: Callable, args: tuple, shape: tuple[int, ...], **kwargs: Any) -> Node:
    """A new call in front of ``before``, of float32."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta.update(shape=tuple(shape), dtype=torch.float32, role=_role(node.all_input_nodes))
    return node


def replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def chain(node: Node) -> tuple[list[Node], Node | None]:
    """(the views behind a node, each the only user of the one before; the only user of the last)."""
    views: list[Node] = []
    while is_call((user := only_user(views[-1] if views else node)), *VIEWS) and is_tensor(user):
        views.append(user)
    return views, user


def through(views: Iterable[Node], memory: torch.Tensor) -> torch.Tensor | None:
    """Return ``memory`` as the views show it; None if one of them copies."""
    for view in views:
        name = name_of(view.target)
        if name in ("view", "reshape"):
            y = memory.reshape(shape(view))
        elif view.op == "call_method":
            y = getattr(memory, view.target)(*view.args[1:], **view.kwargs)
        else:
            y = view.target(memory, *view.args[1:], **view.kwargs)
        if y.untyped_storage()._cdata != memory.untyped_storage()._cdata:
            return None
        memory = y
    return memory
