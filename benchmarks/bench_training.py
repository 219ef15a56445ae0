"""One whole training step in float32: forward, backward, the gradient's norm, AdamW, the average of the weights.

Beside the same network with torch's convolutions, and diffusers' with all of torch. Each takes its steps on its own
weights; the first one, from the same, is what is checked.
"""

import copy
from collections.abc import Callable

import peers
import pytest
import torch
from bench_unet import NETWORKS, with_random_weights
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import ops
from diffkern.unet import Conv3x3, UNet


def with_torchs_convolutions(unet: UNet) -> UNet:
    unet = copy.deepcopy(unet)
    for module in unet.modules():
        if isinstance(module, Conv3x3):
            module.__class__ = nn.Conv2d
    return unet


def stepper(network: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> peers.Call:
    """A call that takes a step and returns the loss and the gradient's norm."""
    network.train().requires_grad_(True)
    parameters, average = list(network.parameters()), [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-4, fused=True)

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-3)
        return loss.detach(), norm

    return step


@pytest.mark.parametrize(("name", "n"), [("small", 64), pytest.param("ddpm-cifar10", 8, marks=pytest.mark.large)])
def test_training_step(compare, name, n):
    unet = with_random_weights(UNet(**NETWORKS[name]))
    shape = (unet.config["in_channels"], 32, 32)
    x_t = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    t, seeds = torch.arange(n) * 1000 // n, ops.as_seeds(range(n))
    eps = ops.noise(seeds, shape, step=t, stream=2)

    def loss(network: nn.Module) -> Tensor:
        return ops.noise_loss(network(x_t, t), seeds, t).mean()

    def torchs_loss(network: nn.Module) -> Tensor:
        return F.mse_loss(network(x_t, t, return_dict=False)[0], eps)

    def close(ours: list[Tensor], others: list[Tensor]) -> None:
        for result, other in zip(ours, others, strict=True):
            assert (result - other).abs() < 1e-5 * other

    twin, same_but_convolutions = peers.diffusers_unet(unet), with_torchs_convolutions(unet)
    compare(
        f"training step {name}, {n} x 32x32",
        stepper(unet, loss),
        {
            "torch's convolutions": stepper(same_but_convolutions, loss),
            "diffusers": stepper(twin, torchs_loss),
        },
        same=close,
    )
