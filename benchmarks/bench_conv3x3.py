"""The convolution of training, forward and backward, beside torch's, on layers of the two networks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern import ops

# samples, channels, out channels, height and width
LAYERS = [
    (8, 128, 128, 32),
    (8, 256, 256, 16),
    (8, 256, 256, 8),
    (8, 512, 256, 4),
    (64, 32, 32, 32),
    (64, 128, 128, 8),
    (8, 3, 128, 32),
    (8, 128, 3, 32),
]


@pytest.mark.parametrize(("n", "c", "k", "side"), LAYERS)
def test_conv3x3(compare, n, c, k, side):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad_y = (
        torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
        for shape in ((n, c, side, side), (k, c, 3, 3), (n, k, side, side))
    )
    inputs = [x.requires_grad_(), (weight / (9 * c) ** 0.5).requires_grad_(), torch.zeros(k, requires_grad=True)]

    def forward_and_backward(op) -> list[Tensor]:
        y = op(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]

    def close(ours: list[Tensor], others: list[Tensor]) -> None:
        for result, other in zip(ours, others, strict=True):
            assert (result - other).abs().max() < 2e-5 * other.abs().max()

    compare(
        f"conv3x3 [{n}, {c}, {side}, {side}] -> {k}, with gradients",
        lambda: forward_and_backward(ops.conv3x3),
        {"torch": lambda: forward_and_backward(lambda *inputs: F.conv2d(*inputs, padding=1))},
        same=close,
        flops=3 * 2 * 9 * n * c * k * side**2,
    )
