"""Convolution beside torch's, which is oneDNN's: the shapes of U-Nets in float32, channels_last.

``pytest benchmarks/bench_conv2d.py --benchmark-only``
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern import ops
from diffkern.engine.packing import FEW_CHANNELS, FEW_TILES, terms_of

MOST = [  # N, C, K, pixels a side of x, kernel, stride
    *[(16, 384, 256, 32, 1, 1), (1, 128, 128, 32, 3, 2), (16, 3, 128, 32, 3, 1), (1, 256, 256, 8, 3, 1)],
    *[(1, 128, 128, 32), (16, 256, 256, 16), (1, 256, 256, 8)],  # by Winograd
]
DIRECT = [  # N, C, K, pixels a side of x, kernel, stride
    *((n, 384, 256, side, 1, 1) for n in (1, 16) for side in (8, 32)),
    *((n, 256, 768, 16, 1, 1) for n in (1, 16)),
    *((n, 128, 128, 32, 3, 2) for n in (1, 16)),
    *((n, c, k, 32, 3, 1) for n in (1, 16) for c, k in ((3, 128), (1, 32), (128, 3), (32, 1))),
    *((1, 256, 256, side, 3, 1) for side in (4, 8)),
]
WINOGRAD = [  # N, C, K, pixels a side of x
    *((n, c, c, 32) for n in (1, 16) for c in (32, 64, 128, 256)),
    *((n, c, k, 16) for n in (1, 16) for c, k in ((64, 64), (256, 256), (512, 256))),
    *((n, c, c, 8) for n in (1, 16) for c in (128, 256)),
    *((n, 256, 256, 4) for n in (1, 16)),
]


def marked(shapes: list[tuple[int, ...]]) -> list:
    return [shape if shape in MOST else pytest.param(*shape, marks=pytest.mark.large) for shape in shapes]


def tensors(n: int, c: int, k: int, side: int, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, side, side, generator=generator)
    weight = torch.randn(k, c, kernel, kernel, generator=generator) / (c * kernel**2) ** 0.5
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return x, weight, torch.randn(k, generator=generator)


@pytest.mark.parametrize(("n", "c", "k", "side", "kernel", "stride"), marked(DIRECT))
def test_conv2d_direct(compare, n, c, k, side, kernel, stride):
    x, weight, bias = tensors(n, c, k, side, kernel)
    floats, options = ops.pack_conv(weight), dict(stride=stride, padding=kernel // 2)
    peers = {"torch": lambda: F.conv2d(x, weight, bias, **options)}
    terms = terms_of(torch.float32) if min(c, k) > FEW_CHANNELS else None
    if terms is None:
        packed = floats
    else:
        packed = ops.pack_conv(weight, terms=terms)
        peers["by floats"] = lambda: ops.conv2d(x, floats, bias, **options)
    if kernel == 1:
        rows, matrix = x.permute(0, 2, 3, 1), weight[:, :, 0, 0].contiguous()
        peers["linear"] = lambda: F.linear(rows, matrix, bias).permute(0, 3, 1, 2)
    with torch.inference_mode():
        compare(
            f"conv2d {kernel}x{kernel} / {stride} [{n}, {c}, {side}, {side}] -> {k}, by {terms or 'no'} terms",
            lambda: ops.conv2d(x, packed, bias, **options),
            peers,
            flops=2 * n * c * k * (side // stride) ** 2 * kernel**2,
        )


@pytest.mark.parametrize(("n", "c", "k", "side"), marked(WINOGRAD))
def test_conv2d_winograd(compare, n, c, k, side):
    """The rate is that of the definition's operations: what is beyond a matrix product's was never computed."""
    x, weight, bias = tensors(n, c, k, side, 3)
    taps, direct = ops.pack_taps(weight), ops.pack_conv(weight)
    few = n * (-(-side // 4)) ** 2 <= FEW_TILES
    packed, other = (taps, ops.expand_taps(taps)) if few else (ops.expand_taps(taps), taps)
    with torch.inference_mode():
        compare(
            f"conv2d F(4x4, 3x3) [{n}, {c}, {side}, {side}] -> {k}",
            lambda: ops.conv2d(x, packed, bias),
            {
                "torch": lambda: F.conv2d(x, weight, bias, padding=1),
                "direct": lambda: ops.conv2d(x, direct, bias),
                "by matrices" if few else "by taps": lambda: ops.conv2d(x, other, bias),
            },
            tolerance=2e-5,
            flops=2 * 9 * n * c * k * side**2,
        )
