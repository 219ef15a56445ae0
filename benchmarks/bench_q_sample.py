"""Forward noising of a batch, each sample at its own step: x_0 in, x_t out."""

import peers
import pytest
import torch

from diffkern import ops, reference
from diffkern.schedule import Schedule

TABLE = Schedule.linear().q_table()
SHAPES = [(64, 3, 32, 32), (4, 3, 512, 512)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_q_sample(compare, shape, dtype):
    x_0 = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(dtype)
    t, seeds = torch.linspace(100, 999, shape[0]).long(), torch.arange(shape[0])
    assert torch.equal(
        ops.q_sample(x_0[:1], t[:1], seeds[:1], TABLE), reference.q_sample(x_0[:1], t[:1], seeds[:1], TABLE)
    )

    def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
        """Other noise, of the same variance around the same mean: that of their difference."""
        scale = (2 * (1 - Schedule.linear().alpha_bar[t])).sqrt().view(-1, 1, 1, 1)
        ratio = ((ours[0].double() - theirs[0].double()) / scale).std().item()
        assert abs(ratio - 1) < 6 / (2 * x_0.numel()) ** 0.5 + 0.01

    others = {
        "torch": peers.torch_q_sample(x_0, t, TABLE),
        "torch.compile": peers.torch_compiled_q_sample(x_0, t, TABLE),
    }
    if dtype == torch.float32:
        others["diffusers"] = peers.diffusers_add_noise(x_0, t)
    compare(
        f"q_sample {str(dtype)[6:]} {list(shape)}",
        lambda: ops.q_sample(x_0, t, seeds, TABLE),
        others,
        same=same,
        elements=x_0.numel(),
        bytes=2 * x_0.numel() * dtype.itemsize,
    )
