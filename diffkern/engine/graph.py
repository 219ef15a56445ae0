"""The graph of a call: its values in the order in which they are computed, each with those that read it.

``torch.fx`` has one too, for code that is generated from it: names, type hints, a search by function. To make a node of
it takes 40 us, and a U-Net has a thousand. This one takes 3.
"""

from collections.abc import Iterator
from typing import Any

from .functions import name_of
from .trees import leaves_of, mapped


class Node:
    """One value.

    kind    "input" of the call, "weight" of the network, "constant", "call" of a function, or the "output"
    target  the function; for a weight or constant its tensor
    name    the function's, as ``name_of`` gives it, or ""
    inputs  the nodes among args and kwargs, each once
    users   the nodes whose input it is
    shape, dtype  those of a tensor; for a number () and its type; for several results None
    role    what it depends on (``rules.nodes``)
    """

    __slots__ = (
        *("kind", "target", "name", "args", "kwargs", "inputs", "users", "shape", "dtype", "role", "graph", "erased"),
        *("_before", "_after"),
    )

    def __init__(self, graph: "Graph", kind: str, target: Any):
        self.graph, self.kind, self.target, self.erased = graph, kind, target, False
        self.name = name_of(target) if kind == "call" else ""
        self.args, self.kwargs = (), {}
        self.inputs: list[Node] = []
        self.users: dict[Node, None] = {}
        self.shape: tuple[int, ...] | None = None
        self.dtype: Any = None
        self.role = ""

    def set_args(self, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        """Give it other arguments, and take out what nothing uses any more. ``kwargs`` stay where there are none."""
        before, self.args, self.kwargs = self.inputs, args, self.kwargs if kwargs is None else kwargs
        self.inputs = list(dict.fromkeys([leaf for leaf in leaves_of((args, self.kwargs)) if type(leaf) is Node]))
        for node in before:
            del node.users[self]
        for node in self.inputs:
            node.users[self] = None
        for node in before:
            self.graph.drop(node)

    def replace_input(self, old: "Node", new: "Node") -> None:
        def other(leaf: Any) -> Any:
            return new if leaf is old else leaf

        self.set_args(mapped(other, self.args), mapped(other, self.kwargs))


class Graph:
    """Nodes in a ring of neighbours, so that one can be put before another, or taken out, at any place.

    They stand in the order of computation, but for those of weights alone: these are computed before all others.
    """

    def __init__(self) -> None:
        self._end = Node(self, "end", None)
        self._end._before = self._end._after = self._end

    def __iter__(self) -> Iterator[Node]:
        node = self._end._after
        while node is not self._end:
            yield node
            node = node._after

    def add(
        self, kind: str, target: Any = None, args: tuple = (), kwargs: dict[str, Any] | None = None, before: Any = None
    ) -> Node:
        """A new node in front of ``before``, or as the last."""
        node = Node(self, kind, target)
        node.set_args(args, kwargs)
        node._after = self._end if before is None else before
        node._before = node._after._before
        node._before._after = node._after._before = node
        return node

    def drop(self, node: Node) -> None:
        """Take out a node that nothing uses, with what it alone uses; but no input of the call."""
        unused = [node]
        while unused:
            node = unused.pop()
            if not (node.users or node.erased or node.kind in ("input", "output")):
                node._before._after, node._after._before, node.erased = node._after, node._before, True
                for one in node.inputs:
                    del one.users[node]
                unused += node.inputs

    def replace(self, old: Node, new: Node) -> None:
        """Let all that use ``old`` use ``new``, and take ``old`` out."""
        for user in list(old.users):
            user.replace_input(old, new)
        self.drop(old)

    def sweep(self) -> None:
        """Take out what was made and never used."""
        for node in list(self):
            self.drop(node)

    @property
    def inputs(self) -> list[Node]:
        return [node for node in self if node.kind == "input"]

    @property
    def output(self) -> Node:
        return self._end._before


def evaluate(nodes: list[Node], values: dict[Node, Any]) -> None:
    """Compute calls by torch, from the values that are there."""

    def value_of(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, Node) else leaf

    for node in nodes:
        values[node] = node.target(*mapped(value_of, node.args), **mapped(value_of, node.kwargs))
