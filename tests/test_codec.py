"""Codecs: autoencoders of diffusers'."""

import diffusers
import pytest
import torch
from torch import nn

from diffkern import Model, Schedule, interpolate, sample
from diffkern.codec import Codec

SMALL = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1)
BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
AUTOENCODERS = {
    "kl": lambda: diffusers.AutoencoderKL(**SMALL, **BLOCKS, scaling_factor=0.5, shift_factor=0.25),
    "vq": lambda: diffusers.VQModel(
        **SMALL, **BLOCKS, num_vq_embeddings=8, vq_embed_dim=4, scaling_factor=2.0
    ),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), upsampling_scaling_factor=2, latent_channels=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_an_autoencoder_of_diffusers_is_a_codec(name):
    torch.manual_seed(0)
    autoencoder = AUTOENCODERS[name]().eval()
    codec, x = Codec.from_diffusers(autoencoder), torch.rand(2, 3, 16, 16) * 2 - 1
    told = autoencoder.encode(x)
    z = told.latent_dist.mean if name == "kl" else told.latents
    config = autoencoder.config
    shift = getattr(config, "shift_factor", None) or 0.0
    assert torch.equal(codec.to_model(x), (z - shift) * config.scaling_factor)
    assert torch.equal(
        codec.to_images(codec.to_model(x)), autoencoder.decode(codec.to_model(x) / config.scaling_factor + shift).sample
    )


class Zero(nn.Module):
    def forward(self, x, t, labels):
        return torch.zeros_like(x)


def test_a_model_of_its_latents_draws_images():
    torch.manual_seed(0)
    autoencoder = AUTOENCODERS["kl"]().eval()
    model = Model(Zero(), Schedule.linear(10), "x0", (4, 8, 8), codec=Codec.from_diffusers(autoencoder))
    x = sample(model, 2, steps=2, progress=False)
    with torch.no_grad():
        expected = autoencoder.decode(torch.full((2, 4, 8, 8), 0.25)).sample  # x_0 is 0
    torch.testing.assert_close(x, expected)
    assert not x.requires_grad
    between = interpolate(model, torch.rand(3, 16, 16), 1, 3, fraction=0.5, steps=4, progress=False)
    assert between.shape == (3, 3, 16, 16) and not between.requires_grad


def test_what_is_no_such_autoencoder_is_refused():
    with pytest.raises(TypeError, match="autoencoder: expected one of diffusers', got Linear"):
        Codec.from_diffusers(nn.Linear(2, 2))
    autoencoder = AUTOENCODERS["kl"]()
    autoencoder.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="latents_mean: expected None, for latents have one scale"):
        Codec.from_diffusers(autoencoder)
