"""Embeddings of time steps and labels: computed once for each of their values, one sample at a time.

    values of the small inputs of a sample -> one row: what the main nodes read of them

Torch's product for a batch is not that for each of its rows, bit for bit. Rows come from the graph of one sample, so
that a sample's bits do not depend on its batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import rules
from .functions import called, name_of
from .words import words

KEPT_ROWS = 4096

ROWWISE = rules.VIEWS | words(
    "add sub mul div neg __rsub__ rsub __rtruediv__ pow exp log sin cos sqrt rsqrt abs sigmoid tanh silu gelu",
    "relu mish softplus elu leaky_relu clamp clamp_min clamp_max linear embedding to float double long int type",
    "type_as expand expand_as repeat getitem chunk split select narrow cat stack pad where eq ne lt le gt ge",
    "__and__ __or__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ logical_and logical_or logical_not",
    "bitwise_and bitwise_or bitwise_not zeros_like ones_like full_like layer_norm item_of tensor as_tensor",
    "broadcast_to contiguous clone detach square reciprocal log1p expm1 one_hot",
)
"""Functions that take the samples of a batch apart."""


def frontier(graph: fx.Graph) -> list[fx.Node]:
    """The small nodes that main nodes read, or the result."""
    return [
        node
        for node in graph.nodes
        if node.op != "output" and node.meta["role"] == "small" and any(map(_reads, node.users))
    ]


def _reads(user: fx.Node) -> bool:
    return user.op == "output" or user.meta["role"] == "main"


def evaluate(graph: fx.Graph, role: str, values: dict[fx.Node, Any]) -> None:
    """Compute the nodes of a role, by torch, from the values that are there."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.meta["role"] == role:
            args, kwargs = (fx.node.map_arg(tree, values.__getitem__) for tree in (node.args, node.kwargs))
            values[node] = called(node.target, args, kwargs)


@dataclasses.dataclass
class Small:
    """The small inputs of a graph: which they are, and what they hold."""

    nodes: list[fx.Node]
    places: list[int]  # among the leaves of the call

    def values(self, leaves: Sequence[Any]) -> list[Any]:
        return [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in (leaves[i] for i in self.places)]


class Whole:
    """The embeddings of a batch together, computed where its small inputs are others than before."""

    alone = False  # rows are not taken apart

    def __init__(self, graph: fx.Graph, static: dict[fx.Node, Any], small: Small):
        self.graph, self.static, self.small, self.read = graph, static, small, frontier(graph)
        self._last: tuple[Any, list[Tensor]] | None = None

    def fill(self, buffers: list[Tensor], leaves: Sequence[Any]) -> bool:
        """Put them into the plan's memory. Returns whether they are finite."""
        key = repr(self.small.values(leaves))
        if self._last is None or self._last[0] != key:
            given = dict(zip(self.small.nodes, (leaves[i] for i in self.small.places), strict=True))
            values = {**self.static, **given}
            evaluate(self.graph, "small", values)
            self._last = key, [values[node] for node in self.read]
        for buffer, value in zip(buffers, self._last[1], strict=True):
            buffer.copy_(value)
        return all(bool(value.isfinite().all()) for value in self._last[1])


class Rows:
    """The embeddings of a sample, by the graph of one; kept by the values of its small inputs."""

    alone = True

    def __init__(self, graph: fx.Graph, static: dict[fx.Node, Any], small: Small, samples: int):
        self.graph, self.static, self.small, self.read = graph, static, small, frontier(graph)
        self.samples, self._kept = samples, {}
        self._widths = [node.meta["shape"] and int(torch.Size(node.meta["shape"]).numel()) for node in self.read]

    def fill(self, buffers: list[Tensor], leaves: Sequence[Any]) -> bool:
        """Put them into the plan's memory. Returns whether they are finite."""
        lists = [
            value
            if isinstance(value, list) and len(value) == self.samples
            else [tuple(value) if isinstance(value, list) else value] * self.samples
            for value in self.small.values(leaves)
        ]
        keys = list(zip(*lists, strict=True))
        if len(self._kept) > KEPT_ROWS:
            self._kept.clear()
        for i, key in enumerate(keys):
            if key not in self._kept and not self._add(key, i, leaves):
                return False
        rows = [self._kept[key] for key in keys]
        same = all(row is rows[0] for row in rows)
        rows = rows[0].expand(self.samples, -1) if same else torch.stack(rows)
        torch.split_with_sizes_copy(
            rows, self._widths, dim=1, out=[buffer.view(self.samples, -1) for buffer in buffers]
        )
        return True

    def _add(self, key: Any, i: int, leaves: Sequence[Any]) -> bool:
        values = dict(self.static)
        for node, place in zip(self.small.nodes, self.small.places, strict=True):
            leaf = leaves[place]
            each = isinstance(leaf, Tensor) and leaf.ndim == 1 and len(leaf) == self.samples
            values[node] = leaf[i : i + 1].clone() if each else leaf
        evaluate(self.graph, "small", values)
        row = torch.cat([values[node].reshape(-1) for node in self.read])
        if not row.isfinite().all():  # a label that there is not, or a network that has diverged
            return False
        self._kept[key] = row
        return True


def embeddings(
    graph: fx.Graph,
    static: dict[fx.Node, Any],
    small: Small,
    samples: int,
    alone: Callable[[], tuple[fx.Graph, dict[fx.Node, Any], Small] | None],
) -> Rows | Whole:
    """Rows where each is what it is alone; else the batch's together.

    alone  gives the rewritten graph of the first sample, its static values and its small inputs; None if there is none
    """
    whole = Whole(graph, static, small)
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.meta["role"] == "small"]
    if not all(name_of(node.target) in ROWWISE for node in nodes):
        return whole
    if any(len(shape) == 1 and shape[0] not in (1, samples) for shape in map(rules.shape, small.nodes)):
        return whole
    found = (graph, static, small) if samples == 1 else alone()
    if found is None:
        return whole
    one, many = frontier(found[0]), whole.read
    fits = len(one) == len(many) and all(
        rules.is_float(a, b) and rules.shape(a)[:1] == (1,) and (samples, *rules.shape(a)[1:]) == rules.shape(b)
        for a, b in zip(one, many, strict=True)
    )
    same = [name_of(node.target) for node in one] == [name_of(node.target) for node in many]
    return Rows(*found, samples) if fits and same else whole
