"""``explain``: which parts of a network go where."""

import collections
import dataclasses
import functools
import math
from typing import Any

import torch
from torch import nn

from . import rules
from .capture import NotCaptured
from .compiled import Case, signature
from .graph import Node
from .optimized import dtype_of, unwrapped, why_not_now
from .packing import Store
from .watch import Modules, Numbers
from .words import words


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a call of a network runs; ``str()`` of it is a table.

    why_not      why the network itself runs, or ""
    ours         calls of our kernels, by kind
    by_torch     calls of torch's functions, by name
    share        the part of the products and sums that our kernels do, 0 to 1, as far as they are counted: those of
                 convolutions, linear layers, attention and products of matrices
    independent  are a sample's bits the same in any batch? Our kernels and torch's elementwise ones see to it; for its
                 others nobody does
    bytes        the memory of all values between input and output
    """

    why_not: str
    ours: dict[str, int]
    by_torch: dict[str, int]
    share: float
    independent: bool
    bytes: int

    def __str__(self) -> str:
        if self.why_not:
            return f"the network itself runs: {self.why_not}"
        lines = [f"{count:5d} {name}, ours" for name, count in self.ours.items()]
        lines += [f"{count:5d} {name}, torch's" for name, count in self.by_torch.items()]
        bits = "do not depend" if self.independent else "may depend"
        lines += [
            f"{100 * self.share:.1f}% of the arithmetic is ours; bits of a sample {bits} on its batch",
            f"{self.bytes / 2**20:.1f} MiB between input and output",
        ]
        return "\n".join(lines)


def explain(network: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Say how ``optimize(network)(*args, **kwargs)`` runs. It makes the recording, and keeps nothing of it.

    Raises what the network raises for wrong inputs.
    """
    dtype = dtype_of(network) or torch.float32
    network = unwrapped(network)
    nothing = dict(ours={}, by_torch={}, share=0.0, independent=False, bytes=0)
    leaves: list[Any] = []
    signature((args, kwargs), leaves)
    with torch.no_grad():
        modules = Modules(network)
        why_not = why_not_now(leaves) or modules.why_not or Numbers(modules.tensors).why_not
        if why_not:
            return Explanation(why_not, **nothing)
        run = functools.partial(type(network).forward, network)
        case = Case(run, args, kwargs, modules.tensors, dtype, Store(), lambda: not modules.changed())
        if case.why_not:
            return Explanation(case.why_not, **nothing)
        try:
            case.run(leaves)
        except NotCaptured:
            run(*args, **kwargs)  # it raises, or gives what is not finite
    ours, others = (
        collections.Counter(step.node.name for step in case.plan.steps if step.native == native)
        for native in (True, False)
    )
    main = [node for node in case.graph if node.kind == "call" and node.role == "main"]
    operations = {node: _operations(node) for node in main}
    total = sum(operations.values())
    share = sum(count for node, count in operations.items() if rules.is_ours(node, *rules.OURS)) / max(1, total)
    independent = (not case.read or case.embeddings.alone) and others.keys() <= APART
    return Explanation("", dict(ours), dict(others), share, independent, case.plan.memory.bytes)


APART = words(
    "add sub mul div neg exp sqrt rsqrt relu cat stack clone reshape view flatten contiguous permute transpose",
    "conv norm attention layer_norm avg_pool2d max_pool2d interpolate pad getitem narrow chunk expand to float",
)
"""Torch's functions, and copies, that round each element by itself, whatever lies beside it."""


def _operations(node: Node) -> int:
    """Products and sums, of those that are counted."""
    if rules.is_ours(node, rules.conv):
        weights = sum(math.prod(rules.shape(weight)) for weight in node.args[2])
        n, _, height, width = rules.shape(node)
        return 2 * n * height * width * weights
    if rules.is_ours(node, rules.attention):
        return 4 * math.prod(rules.shape(node)) * rules.shape(node.args[1])[2]
    shapes = [rules.shape(one) for one in node.inputs if rules.is_tensor(one)]
    name = node.name
    if len(shapes) < 2:
        return 0
    if name in ("conv1d", "conv2d", "conv3d", "linear") and rules.is_tensor(node):
        return 2 * math.prod(rules.shape(node)) * math.prod(shapes[1][1:])
    if name in ("matmul", "bmm", "baddbmm", "mm", "einsum") and rules.is_tensor(node):
        return 2 * math.prod(rules.shape(node)) * shapes[-2][-1]
    if name == "scaled_dot_product_attention":
        return 4 * math.prod(rules.shape(node)) * shapes[1][-2]
    return 0
