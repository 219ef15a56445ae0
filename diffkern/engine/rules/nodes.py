"""Nodes of a graph: our kernels' calls, what rules ask of nodes, and how they put others in their place.

A node's role says what it depends on: "static" on weights alone, "small" on time steps and labels besides, "main" on
images. Rules look at main nodes; the weights that they take are static.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..graph import Graph, Node
from ..trees import leaves_of
from ..words import words


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


def assign_roles(graph: Graph) -> None:
    for node in graph:
        if node.kind == "input":
            node.role = "small" if len(node.shape) <= 1 else "main"
        elif node.kind != "output":
            node.role = _role(node.inputs)


def _role(inputs: Iterable[Node]) -> str:
    roles = {node.role for node in inputs}
    return "main" if "main" in roles else "small" if "small" in roles else "static"


def is_call(node: Any, *names: str) -> bool:
    """A main node that calls a function of one of these names?"""
    return is_call_of_any(node, *names) and node.role == "main"


def is_call_of_any(node: Any, *names: str) -> bool:
    """As ``is_call``, for a node of any role."""
    return isinstance(node, Node) and node.name in names and node.target not in OURS


def is_ours(node: Any, *targets: Callable) -> bool:
    return isinstance(node, Node) and node.kind == "call" and node.target in targets


def calls(graph: Graph, *names: str) -> Iterator[Node]:
    """As they are now: rules change the graph."""
    return (node for node in list(graph) if node.name in names and not node.erased and is_call(node, *names))


def ours(graph: Graph, *targets: Callable) -> Iterator[Node]:
    return (node for node in list(graph) if node.kind == "call" and not node.erased and node.target in targets)


def shape(node: Node) -> tuple[int, ...]:
    return node.shape


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.dtype, torch.dtype)


def is_float(*nodes: Any) -> bool:
    return all(is_tensor(node) and node.dtype == torch.float32 for node in nodes)


def is_static(*nodes: Any) -> bool:
    return all(is_float(node) and node.role == "static" for node in nodes if node is not None)


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def uses(user: Node, node: Node) -> int:
    return sum(leaf is node for leaf in leaves_of((user.args, user.kwargs)))


def bound(node: Node, names: str, **defaults: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**defaults, **dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def make(
    before: Node, target: Callable, args: tuple, shape: tuple[int, ...], kwargs: dict[str, Any] | None = None
) -> Node:
    """A new call in front of ``before``, of float32."""
    node = before.graph.add("call", target, args, kwargs, before=before)
    node.shape, node.dtype, node.role = tuple(shape), torch.float32, _role(node.inputs)
    return node


def replace(old: Node, new: Node) -> None:
    old.graph.replace(old, new)


def chain(node: Node) -> tuple[list[Node], Node | None]:
    """(the views behind a node, each the only user of the one before; the only user of the last)."""
    views: list[Node] = []
    while is_call((user := only_user(views[-1] if views else node)), *VIEWS) and is_tensor(user):
        views.append(user)
    return views, user


def through(views: Iterable[Node], memory: torch.Tensor) -> torch.Tensor | None:
    """Return ``memory`` as the views show it; None if one of them copies."""
    for view in views:
        if view.name in ("view", "reshape"):
            y = memory.reshape(shape(view))
        else:
            y = view.target(memory, *view.args[1:], **view.kwargs)
        if y.untyped_storage()._cdata != memory.untyped_storage()._cdata:
            return None
        memory = y
    return memory
