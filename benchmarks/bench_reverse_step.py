"""The reverse step, in place as the sampling loop runs it: read x and the network's output once, write x once."""

import functools

import peers
import pytest
import torch

from diffkern import ops, reference, torch_ops
from diffkern.samplers import ddpm
from diffkern.schedule import Schedule

TABLE = ddpm(Schedule.linear(), range(999, -1, -1)).float()
SHAPES = [(16, 3, 32, 32), (64, 3, 32, 32), (4, 3, 512, 512)]
T = 500


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reverse_step(compare, shape, dtype):
    x, out = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    step, seeds, row = torch.tensor(999 - T), torch.arange(shape[0]), peers.row_of(TABLE, 999 - T)
    arguments = (out, TABLE, step, seeds)
    assert torch.equal(ops.reverse_step(x, *arguments, clip=True), reference.reverse_step(x, *arguments, clip=True))

    def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
        """Other noise, of the same variance around the same mean: that of their difference."""
        ratio = ((ours[0].double() - theirs[0].double()) / (2**0.5 * row["sigma"])).std().item()
        assert abs(ratio - 1) < 6 / (2 * x.numel()) ** 0.5 + 0.01

    state = x.clone()

    def ours() -> torch.Tensor:
        ops.reverse_step_(state, *arguments, clip=True)
        return state

    others = {
        "torch": peers.torch_reverse_step(x, out, row),
        "torch.compile": peers.torch_compiled_reverse_step(x, out, row),
    }
    if dtype == torch.float32:
        others["diffusers"] = peers.diffusers_ddpm_step(x, out, T)
    compare(
        f"reverse_step {str(dtype)[6:]} {list(shape)}",
        ours,
        others,
        same=same,
        elements=x.numel(),
        bytes=3 * x.numel() * dtype.itemsize,
    )


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_reverse_step_without_noise(compare, shape):
    """The same without z, as DDIM has it: what is left is the traffic."""
    x, out = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    table = TABLE.clone()
    table[:, ops.COLUMNS.index("sigma")] = 0
    step, seeds, row = torch.tensor(999 - T), torch.arange(shape[0]), peers.row_of(table, 999 - T)
    state, other, x0_hat = x.clone(), x.clone(), torch.empty_like(x)

    def ours() -> torch.Tensor:
        ops.reverse_step_(state, out, table, step, seeds, clip=True)
        return state

    def plain() -> torch.Tensor:
        torch.mul(other, row["p_x"], out=x0_hat).add_(out, alpha=row["p_o"]).clamp_(-1, 1)
        return other.mul_(row["k_x"]).add_(x0_hat, alpha=row["k_0"])

    compare(
        f"reverse_step without noise {list(shape)}",
        ours,
        {"torch": plain},
        tolerance=1e-5,
        elements=x.numel(),
        bytes=3 * x.numel() * x.itemsize,
    )


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_reverse_step_by_long_rows_with_everything(compare, shape):
    """Guidance, a gradient, two slots of history, what is kept, an inpainting mask and noise in one pass."""
    x, out, uncond, grad, known, *history = torch.randn((7, *shape), generator=torch.Generator().manual_seed(0))
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(1)).round()
    table = torch.linspace(0.1, 0.9, ops.long_columns(2))[None]
    arguments = (x, out, table, torch.tensor(0), torch.arange(shape[0]))
    options = dict(out_uncond=uncond, grad=grad, known=known, mask=mask, history=history)
    options |= dict(address=torch.tensor([[T, 1]]), return_kept=True)
    step = functools.partial(ops.reverse_step, *arguments, **options)
    compare(
        f"reverse_step with everything {list(shape)}",
        step,
        {"torch": torch_ops()(step)},
        elements=x.numel(),
        bytes=round((9 + 1 / shape[1]) * x.numel() * x.itemsize),
    )
