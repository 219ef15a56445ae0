"""diffusers' ``UNet2DModel`` as our U-Net: made of its very parameters, and compared with it."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .blueprint import Blueprint
from .modes import evaluating
from .unet import UNet, widths_of

DIFFUSERS_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")


DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "add_attention": True,
}
"""The options of a ``UNet2DModel``, with the values of those that its config does not name."""


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of our U-Net that is diffusers' ``UNet2DModel`` of that config. ValueError names one that ours has
    not."""
    c = SimpleNamespace(**DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS})
    down_of_up = tuple(kind.replace("Up", "Down") for kind in reversed(c.up_block_types))
    resnets = {
        kind.startswith("Resnet") or (kind.startswith("Attn") and c.downsample_type == "resnet")
        for kind in c.down_block_types[:-1]
    }
    # Without attn_norm_num_groups, the attention in the middle has no norm beside scale-shift blocks.
    unnormed = c.resnet_time_scale_shift != "default" and c.attn_norm_num_groups is None and c.add_attention
    allowed = {
        "down_block_types": all(kind in DIFFUSERS_BLOCKS for kind in c.down_block_types) and len(resnets) < 2,
        "up_block_types": down_of_up == tuple(c.down_block_types),
        "upsample_type": c.upsample_type == c.downsample_type,
        "mid_block_type": c.mid_block_type == "UNetMidBlock2D",
        "mid_block_scale_factor": c.mid_block_scale_factor == 1,
        "time_embedding_type": c.time_embedding_type == "positional",
        "time_embedding_dim": c.time_embedding_dim in (None, 4 * c.block_out_channels[0]),
        "center_input_sample": not c.center_input_sample,
        "act_fn": c.act_fn in ("silu", "swish"),
        "class_embed_type": c.class_embed_type is None,
        "attn_norm_num_groups": not unnormed,
    }
    for name, holds in allowed.items():
        if not holds:
            raise ValueError(f"{name}: expected what diffkern's UNet has, got {getattr(c, name)!r}")
    first, *_ = c.block_out_channels
    return dict(
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        channels=first,
        channel_mult=tuple(width // first if width % first == 0 else width / first for width in c.block_out_channels),
        blocks=c.layers_per_block,
        attention_levels=tuple(i for i, kind in enumerate(c.down_block_types) if kind.startswith("Attn")),
        mid_attention=c.add_attention,
        head_dim=c.attention_head_dim,
        groups=c.norm_num_groups,
        mid_attention_groups=c.attn_norm_num_groups if c.add_attention else None,
        norm_eps=c.norm_eps,
        dropout=c.dropout,
        num_classes=c.num_class_embeds,
        null_class=c.num_class_embeds is None,
        scale_shift=c.resnet_time_scale_shift == "scale_shift",
        resample_blocks=resnets == {True},
        downsample_padding=c.downsample_padding,
        flip_sin_to_cos=c.flip_sin_to_cos,
        freq_shift=c.freq_shift,
    )


def config_of(unet: UNet) -> dict[str, Any]:
    """The config of diffusers' ``UNet2DModel`` that computes what ours does; its last class is our null class.

    Raises ValueError that names an option of ours which diffusers has not.
    """
    c = unet.config
    widths = widths_of(c["channels"], c["channel_mult"])
    levels = range(len(widths))
    attending = {widths[level] for level in c["attention_levels"]} | ({widths[-1]} if c["mid_attention"] else set())
    head_dims = {width // c["heads"] for width in attending} if c["heads"] else {c["head_dim"]}
    allowed = {
        "heads": len(head_dims) < 2,
        "channel_mult": widths[0] == c["channels"],
        "embedding_channels": c["embedding_channels"] in (None, c["channels"]),
        "t_scale": c["t_scale"] == 1,
        "conditions": not c["conditions"],
    }
    for name, holds in allowed.items():
        if not holds:
            raise ValueError(f"{name}: expected what a UNet2DModel of diffusers has, got {c[name]!r}")

    def kind(level: int, side: str) -> str:
        if level in c["attention_levels"]:
            return f"Attn{side}Block2D"
        return f"Resnet{side}sampleBlock2D" if c["resample_blocks"] else f"{side}Block2D"

    resampling = "resnet" if c["resample_blocks"] else "conv"
    return DEFAULTS | dict(
        in_channels=c["in_channels"],
        out_channels=unet.conv_out.out_channels,
        freq_shift=c["freq_shift"],
        flip_sin_to_cos=c["flip_sin_to_cos"],
        down_block_types=tuple(kind(level, "Down") for level in levels),
        up_block_types=tuple(kind(level, "Up") for level in reversed(levels)),
        block_out_channels=tuple(widths),
        layers_per_block=c["blocks"],
        downsample_padding=c["downsample_padding"],
        downsample_type=resampling,
        upsample_type=resampling,
        dropout=c["dropout"],
        attention_head_dim=next(iter(head_dims), None),
        norm_num_groups=c["groups"],
        attn_norm_num_groups=c["mid_attention_groups"] or c["groups"],
        norm_eps=c["norm_eps"],
        resnet_time_scale_shift="scale_shift" if c["scale_shift"] else "default",
        num_class_embeds=None if c["num_classes"] is None else c["num_classes"] + c["null_class"],
        add_attention=c["mid_attention"],
    )


def from_diffusers(network: nn.Module) -> UNet:
    """diffusers' ``UNet2DModel`` as our U-Net, with the very same parameters; its classes are without a null class.

    Raises ValueError that names an option of it which ours has not. It looks at the config and at the parameters;
    :func:`check_same` looks at what the two compute.
    """
    with Blueprint():  # every parameter is replaced
        unet = UNet(**options_of(network.config))
    theirs, ours = network.state_dict(keep_vars=True), unet.state_dict()
    shapes, expected = ({(key, p.shape) for key, p in parameters.items()} for parameters in (theirs, ours))
    if shapes != expected:
        odd = sorted({key for key, _ in shapes ^ expected})
        raise ValueError(f"network: expected the parameters of diffkern's UNet, got others: {', '.join(odd[:3])}")
    for key, parameter in theirs.items():
        module, _, name = key.rpartition(".")
        setattr(unet.get_submodule(module), name, parameter)
    return unet.train(network.training)


def check_same(ours: UNet, theirs: nn.Module) -> None:
    """ValueError unless the two compute the same from a small random input, in eval mode.

    ours    made by ``from_diffusers`` of theirs, with its parameters
    theirs  a ``UNet2DModel``. Nothing is compared where it has no values (device "meta") or gives none that are finite
    """
    weight, classes = ours.conv_in.weight, ours.config["num_classes"]
    if weight.device.type == "meta":
        return
    size = max(8, 2 ** len(ours.config["channel_mult"]))  # 2x2 at the bottom of the U, so that attention has a choice
    x = torch.randn(
        (2, ours.config["in_channels"], size, size),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        device="cpu",
    ).to(weight)
    t = torch.tensor([10, 900], dtype=torch.int64, device=weight.device)
    labels = None if classes is None else torch.tensor([0, classes - 1], dtype=torch.int64, device=weight.device)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), evaluating(ours), evaluating(theirs):
        expected = theirs(x, t, labels).sample
        if not expected.isfinite().all():
            return
        error = (ours(x, t, labels) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    if not error <= _tolerance(weight):
        raise ValueError(
            f"network: expected what diffkern's UNet computes, got a {type(theirs).__name__} whose output differs by "
            f"{error:.1e} of its largest value: it has an option, a hook or a forward that the UNet does not have"
        )


def _tolerance(weight: Tensor) -> float:
    """Return the error that rounding may make, of the largest output. An option that is ignored makes 1e-2 or more."""
    if weight.dtype not in (torch.float32, torch.float64) or torch.get_float32_matmul_precision() != "highest":
        return 0.1  # factors of 8 bits
    return 1e-3 if weight.device.type == "cpu" else 1e-2  # cuDNN's convolutions have factors of 11 bits
