"""Rewriting rules: a captured graph, with our kernels' calls in the place of torch's.

Each rule is a function of the graph that replaces one pattern. :func:`rewrite` applies them in the order in which they
stand there. Calls of ours are nodes whose target is one of three functions, ``conv``, ``norm`` and ``attention``. They
are names with a signature: :mod:`diffkern.engine.plan` makes memory and kernels of them.
"""

from ..graph import Graph
from .attention_rules import attentions, side_by_side
from .conv_rules import convolutions, linears, paddings, token_images, upsamplings
from .nodes import OURS, VIEWS, assign_roles, attention, conv, is_float, is_ours, is_tensor, norm, shape, uses
from .norm_rules import group_norms, scale_shifts, silus
from .sum_rules import added_vectors, concatenations, no_ops, residuals

__all__ = [
    "OURS",
    "VIEWS",
    "attention",
    "conv",
    "is_float",
    "is_ours",
    "is_tensor",
    "norm",
    "rewrite",
    "shape",
    "uses",
]


def rewrite(graph: Graph) -> None:
    """Apply every rule, in place."""
    assign_roles(graph)
    for rule in (no_ops, group_norms, scale_shifts, silus, convolutions, linears, token_images, paddings, upsamplings):
        rule(graph)
        graph.sweep()
    for rule in (attentions, side_by_side, added_vectors, residuals, concatenations):
        rule(graph)
        graph.sweep()
