"""Embeddings of time steps and labels: computed once for each of their values, one sample at a time.

    values of the small inputs of a sample -> one row: what the main nodes read of them

Torch's product for a batch is not that for each of its rows, bit for bit. Rows come from the graph of one sample, so
that a sample's bits do not depend on its batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import rules
from .graph import Graph, Node, evaluate
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


def frontier(graph: Graph) -> list[Node]:
    """The small nodes that main nodes read, or the result."""
    return [node for node in graph if node.role == "small" and any(map(_reads, node.users))]


def _reads(user: Node) -> bool:
    return user.kind == "output" or user.role == "main"


@dataclasses.dataclass
class Small:
    """The small inputs of a graph: which they are, and what they hold."""

    nodes: list[Node]
    places: list[int]  # among the leaves of the call

    def values(self, leaves: Sequence[Any]) -> list[Any]:
        return [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in (leaves[i] for i in self.places)]


class Whole:
    """The embeddings of a batch together, computed where its small inputs are others than before."""

    alone = False  # rows are not taken apart

    def __init__(self, graph: Graph, static: dict[Node, Any], small: Small):
        self.static, self.small, self.read = static, small, frontier(graph)
        self.calls = [node for node in graph if node.kind == "call" and node.role == "small"]
        self._last: tuple[Any, list[Tensor]] | None = None

    def fill(self, buffers: list[Tensor], leaves: Sequence[Any]) -> bool:
        """Put them into the plan's memory. Returns whether they are finite."""
        key = repr(self.small.values(leaves))
        if self._last is None or self._last[0] != key:
            self._last = key, self.computed([leaves[i] for i in self.small.places])
        for buffer, value in zip(buffers, self._last[1], strict=True):
            buffer.copy_(value)
        return all(bool(value.isfinite().all()) for value in self._last[1])

    def computed(self, given: Sequence[Any]) -> list[Tensor]:
        """The embeddings of these small inputs."""
        values = {**self.static, **dict(zip(self.small.nodes, given, strict=True))}
        evaluate(self.calls, values)
        return [values[node] for node in self.read]


class Rows(Whole):
    """The embeddings of each sample alone; kept by the values of its small inputs."""

    alone = True

    def __init__(self, graph: Graph, static: dict[Node, Any], small: Small, samples: int):
        super().__init__(graph, static, small)
        self.samples, self._kept = samples, {}

    def fill(self, buffers: list[Tensor], leaves: Sequence[Any]) -> bool:
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
        flat = [buffer.view(self.samples, -1) for buffer in buffers]
        torch.split_with_sizes_copy(rows, [buffer.shape[1] for buffer in flat], dim=1, out=flat)
        return True

    def _add(self, key: Any, i: int, leaves: Sequence[Any]) -> bool:
        row = torch.cat([value.reshape(-1) for value in self.of(i, leaves)])
        if not row.isfinite().all():  # a label that there is not, or a network that has diverged
            return False
        self._kept[key] = row
        return True

    def of(self, i: int, leaves: Sequence[Any]) -> list[Tensor]:
        """The embeddings of a sample, [1, ...] each."""
        given = [leaves[place] for place in self.small.places]
        each = [isinstance(leaf, Tensor) and leaf.ndim == 1 and len(leaf) == self.samples for leaf in given]
        return self.computed([leaf[i : i + 1].clone() if own else leaf for leaf, own in zip(given, each, strict=True)])

    def fit(self, leaves: Sequence[Any], read: Sequence[Node]) -> bool:
        """Are they the samples of what ``read`` holds of a batch?"""
        try:
            shapes = [tuple(value.shape) for value in self.of(0, leaves)]
        except (IndexError, RuntimeError, ValueError):  # a size of the batch stands among the arguments
            return False
        return shapes == [(1, *rules.shape(node)[1:]) for node in read]


def embeddings(
    graph: Graph,
    static: dict[Node, Any],
    small: Small,
    samples: int,
    leaves: Sequence[Any],
    alone: Callable[[], tuple[Graph, dict[Node, Any], Small] | None],
) -> Whole:
    """Rows where each is what it is alone; else the batch's together.

    The batch's own graph gives rows where none of its arguments is the size of the batch; else that of one sample.

    leaves  of the call
    alone   gives the rewritten graph of the first sample, its static values and its small inputs; None if there is none
    """
    whole = Whole(graph, static, small)
    if not all(node.name in ROWWISE for node in whole.calls):
        return whole
    if any(len(shape) == 1 and shape[0] not in (1, samples) for shape in map(rules.shape, small.nodes)):
        return whole
    if not all(rules.is_float(node) and rules.shape(node)[:1] == (samples,) for node in whole.read):
        return whole
    rows = Rows(graph, static, small, samples)
    if samples == 1 or rows.fit(leaves, whole.read):
        return rows
    found = alone()
    if found is None:
        return whole
    rows = Rows(*found, samples)
    same = [node.name for node in rows.read] == [node.name for node in whole.read]
    return rows if same and rows.fit(leaves, whole.read) else whole
