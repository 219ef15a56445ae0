"""U-Nets of every kind, their inputs, and the same networks by diffusers."""

import torch
from tolerances import UNET
from torch import Tensor, nn

from diffkern.unet import UNet

CONFIGS = {
    "plain": dict(),
    "ddpm_cifar10": dict(channel_mult=(1, 2, 2, 2), attention_levels=(1,), groups=32),
    "fashion_mnist": dict(
        in_channels=1, channel_mult=(1, 2, 4), attention_levels=(2,), num_classes=10, norm_eps=1e-5,
        downsample_padding=1, flip_sin_to_cos=True, freq_shift=0.0,
    ),
    "scale_shift": dict(scale_shift=True),
    "resample_blocks": dict(resample_blocks=True),
    "heads": dict(head_dim=8, mid_attention_groups=16),
    "one_level_without_attention": dict(channel_mult=(1,), attention_levels=(), mid_attention=False),
    "attention_everywhere": dict(attention_levels=(0, 1), blocks=3),
    "class_labels": dict(num_classes=5),
    "learned_variance": dict(learned_variance=True),
    "in_and_out_channels_differ": dict(in_channels=6, out_channels=2),
    "improved_ddpm": dict(
        scale_shift=True, resample_blocks=True, head_dim=16, learned_variance=True, num_classes=3,
        flip_sin_to_cos=True, freq_shift=0.0, downsample_padding=1,
    ),
}  # fmt: skip


def config_of(name: str) -> dict:
    return dict(channels=32, channel_mult=(1, 2), attention_levels=(1,), blocks=2, groups=8) | CONFIGS[name]


def with_random_weights(network: nn.Module) -> nn.Module:
    """Give the network random weights that keep activations of order 1; nothing is left at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return network


def diffusers_twin(unet: UNet) -> nn.Module:
    """The same network by diffusers' names of things."""
    import diffusers  # it takes seconds, which most that read this file can do without

    c = unet.config
    levels = range(len(c["channel_mult"]))

    def block_type(level: int, side: str) -> str:
        if level in c["attention_levels"]:
            return f"Attn{side}Block2D"
        return f"Resnet{side}sampleBlock2D" if c["resample_blocks"] else f"{side}Block2D"

    return diffusers.UNet2DModel(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"] * (2 if c["learned_variance"] else 1),
        block_out_channels=tuple(c["channels"] * m for m in c["channel_mult"]),
        layers_per_block=c["blocks"],
        down_block_types=tuple(block_type(level, "Down") for level in levels),
        up_block_types=tuple(block_type(level, "Up") for level in reversed(levels)),
        add_attention=c["mid_attention"],
        attention_head_dim=c["head_dim"],
        norm_num_groups=c["groups"],
        # said, or its middle attention would have no norm beside scale-shift blocks
        attn_norm_num_groups=c["mid_attention_groups"] or c["groups"],
        norm_eps=c["norm_eps"],
        downsample_padding=c["downsample_padding"],
        downsample_type="resnet" if c["resample_blocks"] else "conv",
        upsample_type="resnet" if c["resample_blocks"] else "conv",
        resnet_time_scale_shift="scale_shift" if c["scale_shift"] else "default",
        num_class_embeds=None if c["num_classes"] is None else c["num_classes"] + 1,
        flip_sin_to_cos=c["flip_sin_to_cos"],
        freq_shift=c["freq_shift"],
    )


def inputs(unet: UNet, size: int = 16) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(3, unet.config["in_channels"], size, size, generator=torch.Generator().manual_seed(1))
    classes = unet.config["num_classes"]
    return x, torch.tensor([0, 500, 999]), None if classes is None else torch.tensor([-1, 0, classes - 1])


def call_twin(twin: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    null = labels is not None and twin.class_embedding.num_embeddings - 1
    return twin(x, t, class_labels=None if labels is None else torch.where(labels < 0, null, labels)).sample


def assert_close(got: Tensor, expected: Tensor, what: str = "") -> None:
    error, scale = (got - expected).abs().max(), expected.abs().max()
    assert error <= UNET * scale, f"{what}: {error} of {scale}"
