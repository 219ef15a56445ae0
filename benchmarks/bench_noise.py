"""Noise: what one standard normal costs."""

import peers
import pytest
import torch

from diffkern import ops, reference

SHAPES = [(16, 3, 32, 32), (64, 3, 32, 32), (4, 3, 512, 512)]


def standard_normal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Other numbers of the same kind: six standard errors of mean and variance."""
    for z in (*ours, *theirs):
        z = z.float()
        assert abs(z.mean()) < 6 / z.numel() ** 0.5
        assert abs(z.square().mean() - 1) < 6 * (2 / z.numel()) ** 0.5 + 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_noise(compare, shape, dtype):
    n, *sample = shape
    seeds, step = torch.arange(n), torch.tensor(500)
    assert torch.equal(ops.noise(seeds[:1], sample, step=500), reference.noise(seeds[:1], sample, step=500))
    others = {"torch": peers.torch_noise(shape, dtype)}
    if dtype == torch.float32:
        others["numpy"] = peers.numpy_noise(shape)
    elements = torch.Size(shape).numel()
    compare(
        f"noise {str(dtype)[6:]} {list(shape)}",
        lambda: ops.noise(seeds, sample, step=step, dtype=dtype),
        others,
        same=standard_normal,
        elements=elements,
        bytes=elements * dtype.itemsize,
    )
