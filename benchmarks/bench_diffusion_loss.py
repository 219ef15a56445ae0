"""The losses that need the image: the squared error of v, and the hybrid loss of a learned variance."""

import peers
import pytest
import torch

from diffkern import ops
from diffkern.schedule import Schedule
from diffkern.training import objectives

SCHEDULE = Schedule.cosine()
SHAPES = [(64, 3, 32, 32), (4, 3, 512, 512)]


def inputs(shape: tuple[int, ...], halves: int) -> tuple[torch.Tensor, ...]:
    """out, x_0, seeds, t and eps: t > 0, for the peer's bound has no bins."""
    generator, n = torch.Generator().manual_seed(0), shape[0]
    out = torch.randn(n, halves * shape[1], *shape[2:], generator=generator).requires_grad_()
    x_0 = torch.randn(shape, generator=generator).clamp(-1, 1)
    seeds, t = torch.arange(n), torch.linspace(1, 999, n).long()
    return out, x_0, seeds, t, ops.noise(seeds, shape[1:], step=t, stream=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_squared_error_of_v(compare, shape):
    out, x_0, seeds, t, eps = inputs(shape, 1)
    table = objectives.min_snr(5, "v").table(SCHEDULE)
    a, s, y_x, y_e, weight = (column.view(-1, 1, 1, 1) for column in table[t, :5].unbind(1))

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        loss = ops.diffusion_loss(out, x_0, seeds, t, table)
        return loss.detach(), torch.autograd.grad(loss.sum(), out)[0]

    def stored() -> tuple[torch.Tensor, torch.Tensor]:
        loss = (out - (y_x * x_0 + y_e * eps)).square().flatten(1).mean(1) * weight.flatten()
        return loss.detach(), torch.autograd.grad(loss.sum(), out)[0]

    compare(
        f"diffusion_loss of v, forward + backward {list(shape)}",
        ours,
        {"torch, noise stored": stored},
        elements=out.numel(),
        bytes=5 * out.numel() * out.itemsize,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_hybrid_loss(compare, shape):
    out, x_0, seeds, t, eps = inputs(shape, 2)
    table = objectives.hybrid().table(SCHEDULE, variance="learned")

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        losses = ops.diffusion_loss(out, x_0, seeds, t, table, learned_variance=True, bound=True)
        return losses.detach(), torch.autograd.grad(losses.sum(), out)[0]

    compare(
        f"hybrid loss, forward + backward {list(shape)}",
        ours,
        {"torch, noise stored": peers.torch_diffusion_loss(out, x_0, eps, table[t])},
        tolerance=1e-4,
        elements=x_0.numel(),
        bytes=8 * x_0.numel() * x_0.itemsize,
    )
