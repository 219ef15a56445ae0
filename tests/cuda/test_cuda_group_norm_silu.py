"""Group norm by the CUDA kernels is the CPU's, forward and backward, up to the order of sums and exp's last bit."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.cuda

CPU = torch.ops.diffkern
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# (N, C, H, W), groups: aligned; channels that are no vector; one pixel; more than a chunk of pixels
SHAPES = [((2, 32, 4, 4), 8), ((2, 6, 5, 3), 3), ((1, 16, 1, 1), 4), ((2, 8, 24, 24), 2)]


def inputs(shape, dtype, layout, options):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    n, c = shape[:2]
    x = (randn(*shape) * 2 + 1).to(dtype).to(memory_format=layout)
    scale_shift = randn(n, 2 * c) * 0.5 if options else None
    add = randn(n, c) if options else None
    residual = randn(*shape).to(dtype).to(memory_format=layout) if options else None
    return x, randn(c), randn(c), scale_shift, add, residual, randn(*shape).to(dtype).to(memory_format=layout)


def run(ops, device: torch.device, arguments: Sequence[Tensor | None], groups: int, silu: bool) -> list[Tensor]:
    """y, mean, rstd, grad_x, grad_offset and grad_slope, of what ``inputs`` gives."""
    x, weight, bias, scale_shift, add, residual, grad_y = (None if a is None else a.to(device) for a in arguments)
    y, mean, rstd = ops.group_norm_silu(x, weight, bias, groups, 1e-5, scale_shift, add, residual, silu)
    grads = ops.group_norm_silu_backward(grad_y, x, mean, rstd, weight, bias, groups, scale_shift, add, silu)
    return [tensor.cpu() for tensor in (y, mean, rstd, *grads)]


def assert_the_cpus(cuda, arguments: Sequence[Tensor | None], groups: int, silu: bool) -> None:
    ours = run(cuda.ops, cuda.device, arguments, groups, silu)
    for got, expected in zip(ours, run(CPU, torch.device("cpu"), arguments, groups, silu), strict=True):
        scale = expected.float().abs().max().item()
        tolerance = TOLERANCE[arguments[0].dtype if got.dtype == arguments[0].dtype else torch.float32]
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(scale, 1.0))
        assert got.stride() == expected.stride()


@pytest.mark.parametrize("options", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_group_norm_silu_and_its_gradient_are_the_cpus(cuda, dtype, layout, options):
    for shape, groups in SHAPES:
        assert_the_cpus(cuda, inputs(shape, dtype, layout, options), groups, options)


@pytest.mark.parametrize(
    ("dtype", "shape", "groups"), [(torch.bfloat16, (1, 2056, 5, 3), 8), (torch.float32, (1, 1167, 5, 7), 3)]
)
def test_groups_of_an_odd_width_are_right(cuda, dtype, shape, groups):
    """Whole groups of which would be no aligned pieces of 16 bytes, or more than shared memory holds."""
    arguments = inputs(shape, dtype, torch.channels_last, False)
    assert_the_cpus(cuda, arguments, groups, False)
    x, weight, bias, *_ = arguments
    exact = torch.nn.functional.group_norm(x.double(), groups, weight.double(), bias.double())
    y = run(cuda.ops, cuda.device, arguments, groups, False)[0]
    assert (y.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("value", [1e8, -3e12])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_constant_image_has_no_variance_however_large_its_value(cuda, layout, value):
    """In one chunk, and in several."""
    for shape in ((1, 6, 7, 8), (1, 6, 130, 32)):
        arguments = inputs(shape, torch.float32, layout, False)
        arguments[0].fill_(value)
        assert_the_cpus(cuda, arguments, 3, True)
        _, mean, rstd, *_ = run(cuda.ops, cuda.device, arguments, 3, True)
        assert (mean == value).all()
        torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5), rtol=1e-6, atol=0)
