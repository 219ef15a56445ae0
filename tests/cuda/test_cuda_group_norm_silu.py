"""Group norm by the CUDA kernels is the CPU's, forward and backward, up to the order of sums and exp's last bit."""

import pytest
import torch

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


@pytest.mark.parametrize("options", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_group_norm_silu_and_its_gradient_are_the_cpus(cuda, dtype, layout, options):
    for shape, groups in SHAPES:
        x, weight, bias, scale_shift, add, residual, grad_y = inputs(shape, dtype, layout, options)
        results = []
        for ops, device in ((cuda.ops, cuda.device), (CPU, torch.device("cpu"))):
            x_, weight_, bias_, scale_shift_, add_, residual_, grad_y_ = (
                None if a is None else a.to(device) for a in (x, weight, bias, scale_shift, add, residual, grad_y)
            )
            y, mean, rstd = ops.group_norm_silu(
                x_, weight_, bias_, groups, 1e-5, scale_shift_, add_, residual_, options
            )
            grads = ops.group_norm_silu_backward(
                grad_y_, x_, mean, rstd, weight_, bias_, groups, scale_shift_, add_, options
            )
            results.append([tensor.cpu() for tensor in (y, mean, rstd, *grads)])
        for ours, theirs in zip(*results, strict=True):
            scale = theirs.float().abs().max().item()
            tolerance = TOLERANCE[dtype if ours.dtype == dtype else torch.float32]
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(scale, 1.0))
            assert ours.stride() == theirs.stride()
