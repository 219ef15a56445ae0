"""``torch.compile(network, backend="diffkern")``: the graph that dynamo traces, run as ``optimize`` runs a network."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .optimized import optimize


class _Bound(nn.Module):
    """A graph whose parameters, which dynamo gives as arguments, are attributes of a module, which can be watched."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__()
        self.graph = graph
        self.bound: dict[int, nn.Parameter] = {}  # by their places among the arguments

    def bind(self, args: Sequence[Any]) -> list[Any]:
        """Hold the parameters among ``args``. Returns the rest."""
        bound = {i: arg for i, arg in enumerate(args) if isinstance(arg, nn.Parameter)}
        if bound.keys() != self.bound.keys() or any(bound[i] is not self.bound[i] for i in bound):
            self.bound = bound
        return [arg for i, arg in enumerate(args) if i not in bound]

    def forward(self, *inputs: Any) -> Any:
        rest = iter(inputs)
        count = len(inputs) + len(self.bound)
        return self.graph(*(self.bound[i] if i in self.bound else next(rest) for i in range(count)))


def diffkern(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Torch's interface of backends. Where weights learn, and where shapes or numbers are symbols that Python computes
    with (``dynamic=True``), dynamo's graph runs as it is."""
    graph.code  # noqa: B018  # dynamo's graphs become Python when they are first asked for it: here, not in a capture
    network = _Bound(graph)
    fast = optimize(network)

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return graph(*args)
        return fast(*network.bind(args))

    return run
