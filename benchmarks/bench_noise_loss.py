"""The training loss, forward and backward, with its noise made again instead of stored."""

import peers
import pytest
import torch

from diffkern import ops


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (4, 3, 512, 512)], ids=str)
def test_noise_loss(compare, shape):
    out = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seeds, t = torch.arange(shape[0]), torch.linspace(0, 999, shape[0]).long()
    eps = ops.noise(seeds, shape[1:], step=t, stream=2)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        loss = ops.noise_loss(out, seeds, t)
        (gradient,) = torch.autograd.grad(loss.sum(), out)
        return loss.detach(), gradient

    def drawn_again() -> tuple[torch.Tensor, torch.Tensor]:
        """Torch's way to store no noise: draw it anew. Its cost, with the numbers of ``eps`` so that results agree."""
        drawn.normal_()
        return stored()

    drawn, stored = torch.empty_like(eps), peers.torch_noise_loss(out, eps)
    compare(
        f"noise_loss forward + backward {list(shape)}",
        ours,
        {"torch, noise stored": stored, "torch, noise drawn": drawn_again},
        elements=out.numel(),
        bytes=3 * out.numel() * out.itemsize,
    )
