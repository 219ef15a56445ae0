"""Attention against torch's own, forward and backward, at the shapes of U-Nets: [N, heads, tokens, d] in float32.

``pytest benchmarks/bench_attention.py --benchmark-only``
"""

import pytest
import torch
from torch.nn import functional as F

from diffkern import ops

MOST = [(1, 256, 64), (16, 256, 256), (1, 64, 256), (16, 16, 256), (1, 1024, 64)]  # N, tokens, d
SHAPES = MOST + [  # one head, as in Ho et al. 2020, and 16 x 16 tokens most of the time
    pytest.param(*shape, marks=pytest.mark.large)
    for shape in (
        *((n, 256, d) for n in (1, 16) for d in (32, 64, 128, 256, 512)),
        *((n, 64, d) for n in (1, 16) for d in (64, 256)),
        *((n, 16, 256) for n in (1, 16)),
        *((1, 1024, d) for d in (64, 256)),
    )
    if shape not in MOST
]


def tensors(n: int, tokens: int, d: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, tokens, 1, d, generator=generator).transpose(1, 2) for _ in range(count)]


@pytest.mark.parametrize(("n", "tokens", "d"), SHAPES)
def test_attention(compare, n, tokens, d):
    q, k, v = tensors(n, tokens, d, 3)
    with torch.inference_mode():
        compare(
            f"attention [{n}, 1, {tokens}, {d}]",
            lambda: ops.attention(q, k, v),
            {"torch": lambda: F.scaled_dot_product_attention(q, k, v)},
            flops=4 * n * tokens**2 * d,
        )


@pytest.mark.parametrize(("terms", "tolerance"), [(1, 2e-2), (2, 1e-4), (3, 1e-5)])
@pytest.mark.parametrize(("n", "tokens", "d"), [(16, 256, 256), (16, 256, 64), (1, 256, 256), (1, 64, 256)])
def test_attention_by_terms(compare, n, tokens, d, terms, tolerance):
    q, k, v, out = tensors(n, tokens, d, 4)

    def by_terms() -> torch.Tensor:
        torch.ops.diffkern.attention_out(out, q, k, v, None, terms)
        return out

    with torch.inference_mode():
        compare(
            f"attention [{n}, 1, {tokens}, {d}] by {terms} terms",
            by_terms,
            {"torch": lambda: F.scaled_dot_product_attention(q, k, v)},
            tolerance=tolerance,
            flops=4 * n * tokens**2 * d,
        )


@pytest.mark.parametrize(("n", "tokens", "d"), SHAPES)
def test_attention_backward(compare, n, tokens, d):
    *inputs, grad_out = tensors(n, tokens, d, 4)
    inputs = [x.requires_grad_() for x in inputs]
    ours, torchs = ops.attention(*inputs), F.scaled_dot_product_attention(*inputs)
    compare(
        f"attention backward [{n}, 1, {tokens}, {d}]",
        lambda: torch.autograd.grad(ours, inputs, grad_out, retain_graph=True),
        {"torch": lambda: torch.autograd.grad(torchs, inputs, grad_out, retain_graph=True)},
        flops=10 * n * tokens**2 * d,
    )
