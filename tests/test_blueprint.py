"""Blueprints: networks on the meta device."""

import torch

from diffkern.networks import UNet
from diffkern.networks.blueprint import Blueprint


def test_a_blueprint_draws_nothing_and_takes_no_memory():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with Blueprint():
        made = UNet(channels=2**20, num_classes=2**20)
    assert torch.equal(torch.get_rng_state(), before)
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}
