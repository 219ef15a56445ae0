"""The network's forward pass, with the same weights in diffusers' ``UNet2DModel``."""

import peers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffkern.unet import UNet

NETWORKS = {
    "3.9 M parameters, 16 x 32x32": (
        16,
        dict(in_channels=1, channels=32, channel_mult=(1, 2, 4), attention_levels=(2,), groups=8, norm_eps=1e-5),
    ),
    "ddpm-cifar10, 35.7 M parameters, 1 x 32x32": (1, dict()),
}


def with_random_weights(unet: UNet) -> UNet:
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return unet.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_unet(compare, name):
    n, config = NETWORKS[name]
    unet = with_random_weights(UNet(**config))
    twin = peers.diffusers_unet(unet)
    x = torch.randn(n, unet.config["in_channels"], 32, 32, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0, 999, n).long()
    with FlopCounterMode(display=False) as counter:
        twin(x, t)

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        return unet(x, t)

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        return twin(x, t).sample

    compare(f"unet {name}", ours, {"diffusers": theirs}, tolerance=1e-3, flops=counter.get_total_flops())
