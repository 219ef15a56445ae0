"""openai's improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021): ADM 64 to 512.

Options have the names of their command lines' flags. Files that openai published are known by their names.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...conditions import Condition
from ...networks import HalfUNet, UNet
from ...schedule import Schedule
from .weights import Option, Weights, fill, split_qkv, unet_options, unet_places, unet_weights

NAME = "openai/guided-diffusion"
ANCHOR = "time_embed.0.weight"
OPTIONS = {
    "image_size": Option(int, "of the images (large_size of an upsampler)"),
    "small_size": Option(int, "of an upsampler's low_res; 0 of no upsampler, where half the channels may be one"),
    "num_heads": Option(int, "attention heads at every level"),
    "num_head_channels": Option(int, "or channels of a head"),
    "use_new_attention_order": Option(bool, "whether q, k and v are split before heads (False)"),
    "noise_schedule": Option(str, "'linear' or 'cosine'"),
    "diffusion_steps": Option(int, "T (1000)"),
    "rescale_timesteps": Option(bool, "where T is not 1000: whether the network counts to 1000 nonetheless"),
    "predict_xstart": Option(bool, "whether the network predicts x_0 (False)"),
    "sigma_small": Option(bool, "whether the variance is the small one, where none is learned (False)"),
}

_ADM = dict(noise_schedule="linear", num_head_channels=64)
_HYBRID = dict(noise_schedule="cosine", diffusion_steps=4000, num_heads=4)
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": dict(image_size=64, noise_schedule="cosine", num_head_channels=64, use_new_attention_order=True),
    "128x128_diffusion": dict(image_size=128, noise_schedule="linear", num_heads=4),
    "256x256_diffusion": dict(image_size=256, **_ADM),
    "256x256_diffusion_uncond": dict(image_size=256, **_ADM),
    "512x512_diffusion": dict(image_size=512, **_ADM),
    "64_256_upsampler": dict(image_size=256, small_size=64, noise_schedule="linear", num_heads=4),
    "128_512_upsampler": dict(image_size=512, small_size=128, **_ADM),
    **{
        f"{size}x{size}_classifier": dict(image_size=size, num_head_channels=64, noise_schedule=schedule)
        for size, schedule in ((64, "cosine"), (128, "linear"), (256, "linear"), (512, "linear"))
    },
    "lsun_bedroom": dict(image_size=256, **_ADM),
    "lsun_cat": dict(image_size=256, **_ADM),
    "lsun_horse": dict(image_size=256, **_ADM),
    "lsun_horse_nodropout": dict(image_size=256, **_ADM),
    "imagenet64_uncond_100M_1500K": dict(image_size=64, rescale_timesteps=True, **_HYBRID),
    "imagenet64_uncond_vlb_100M_1500K": dict(image_size=64, rescale_timesteps=True, **_HYBRID),
    "imagenet64_cond_270M_250K": dict(image_size=64, rescale_timesteps=False, **_HYBRID),
    "cifar10_uncond_50M_500K": dict(image_size=32, rescale_timesteps=True, **_HYBRID),
    "cifar10_uncond_vlb_50M_500K": dict(image_size=32, rescale_timesteps=True, **_HYBRID),
    "upsample_cond_500K": dict(
        **dict(image_size=256, small_size=64, noise_schedule="linear", num_heads=4),
        **dict(diffusion_steps=4000, rescale_timesteps=False),
    ),
    "lsun_uncond_100M_1200K_bs128": dict(image_size=256, noise_schedule="linear", num_heads=1),
    "lsun_uncond_100M_2400K_bs64": dict(image_size=256, noise_schedule="linear", num_heads=1),
}
"""The flags of published files that no tensor shows, by the files' names without suffix."""

PARTS = (
    ("", ""),
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
    ("group_norm", "norm"),
    ("qkv", "qkv"),
    ("to_out.0", "proj_out"),
    ("conv", "op"),
    ("conv", "conv"),
)
OTHERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


class SuperResolution(nn.Module):
    """A U-Net that sees x_t beside a smaller image, enlarged (Nichol & Dhariwal 2021, appendix A.2)."""

    def __init__(self, network: UNet):
        super().__init__()
        self.network = network
        self.num_classes, self.null_class = network.num_classes, network.null_class

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, *, low_res: Tensor) -> Tensor:
        """x_t: [N, C, H, W]; low_res: [N, C, h, w] in [-1, 1]."""
        enlarged = F.interpolate(low_res.to(x_t.dtype), x_t.shape[2:], mode="bilinear")
        return self.network(torch.cat((x_t, enlarged), dim=1), t, labels)


def read_classifier(weights: Weights) -> dict[str, Any]:
    """The arguments of a ``NoisyClassifier``, of a file that openai published: its name has what no tensor shows."""
    if weights.path.stem not in PUBLISHED:
        raise ValueError(f"expected a file with a name that openai gave it, got {weights.path.name}")
    if not weights.has("out.2.positional_embedding"):
        raise ValueError("classifier_pool: expected 'attention', got another")
    options = PUBLISHED[weights.path.stem]
    head_dim, positions = options["num_head_channels"], weights.tensors["out.2.positional_embedding"]
    width, tokens = positions.shape
    size = math.isqrt(tokens - 1)
    levels = (options["image_size"] // size).bit_length()  # each but the last halves
    blocks = (weights.count("input_blocks") - levels) // levels

    def side(way: str, level: int, j: int) -> tuple[str, str]:
        place = f"input_blocks.{1 + level * (blocks + 1) + j}"
        return (f"{place}.0", f"{place}.1") if way == "down" else ("", "")

    def split(tensor: Tensor, block: str) -> tuple[Tensor, Tensor, Tensor]:
        order = "3hd" if block == "pool" else "h3d"
        return split_qkv(tensor, len(tensor) // 3 // head_dim, order)

    others = {ours: theirs for ours, theirs in OTHERS.items() if ours not in ("conv_norm_out", "conv_out")}
    others |= {"norm_out": "out.0", "pool": "out.2"}
    parts = (*PARTS, ("qkv", "qkv_proj"), ("to_out", "c_proj"))
    places = {k: v for k, v in unet_places(levels, blocks, side, others).items() if not k.startswith("up_blocks.")}
    made = unet_weights(weights, places, parts, split, ("out.2.positional_embedding",))
    made["pool.positions"] = positions.T
    channels, in_channels = made["conv_in.weight"].shape[:2]
    widths = [len(made[f"down_blocks.{level}.resnets.0.conv2.weight"]) for level in range(levels)]
    config = dict(
        in_channels=in_channels,
        num_classes=len(made["pool.to_out.weight"]),
        channels=channels,
        channel_mult=[w // channels for w in widths],
        blocks=blocks,
        attention_levels=[i for i in range(levels) if f"down_blocks.{i}.attentions.0.to_q.weight" in made],
        groups=32,
        head_dim=head_dim,
        scale_shift=len(made["mid_block.resnets.0.time_emb_proj.weight"]) == 2 * width,
        resample_blocks="down_blocks.0.downsamplers.0.conv1.weight" in made,
        embedding_channels=made["time_embedding.linear_1.weight"].shape[1],
        pool_size=size,
    )
    return dict(
        network=fill(lambda: HalfUNet(**config), made),
        schedule=_schedule(options["noise_schedule"], 1000),
        shape=(in_channels, *(options["image_size"],) * 2),
        classes=tuple(map(str, range(config["num_classes"]))),
    )


def read(weights: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``Model``."""
    if not weights.has("output_blocks"):
        raise ValueError("expected a U-Net, got a classifier of noisy images, which Guidance(classifier=path) takes")
    options = _published(weights.path.stem, options) | dict(options)
    last = {i: weights.count(f"output_blocks.{i}") - 1 for i in range(weights.count("output_blocks"))}
    ups = [i for i, sub in last.items() if sub > 0 and not weights.has(f"output_blocks.{i}.{sub}.qkv")]
    levels = len(ups) + 1
    blocks = ups[0] if ups else len(last) - 1

    def side(way: str, level: int, j: int) -> tuple[str, str]:
        if way == "down":
            place = f"input_blocks.{1 + level * (blocks + 1) + j}"
            return f"{place}.0", f"{place}.1"
        i = level * (blocks + 1) + min(j, blocks)  # the step up is in the place of the last block
        attention = f"output_blocks.{i}.1" if weights.has(f"output_blocks.{i}.1.qkv") else ""
        return f"output_blocks.{i}.{0 if j <= blocks else last[i]}", attention

    heads = _heads(options)
    order = "3hd" if options.get("use_new_attention_order") else "h3d"

    def split(tensor: Tensor, block: str) -> tuple[Tensor, Tensor, Tensor]:
        width = len(tensor) // 3
        return split_qkv(tensor, heads.get("heads") or width // heads["head_dim"], order)

    made = unet_weights(weights, unet_places(levels, blocks, side, OTHERS), PARTS, split)
    config = (
        unet_options(made, levels, blocks)
        | heads
        | dict(norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0.0)
    )
    T = options.get("diffusion_steps", 1000)
    if T != 1000 and _needed(options, "rescale_timesteps"):
        config["t_scale"] = 1000 / T
    channels, out_channels = config["in_channels"], config["out_channels"]
    if channels % 2 == 0 and out_channels in (channels // 2, channels):  # is x_t half of it?
        small = _needed(options, "small_size")
        channels //= 2 if small else 1
    learned = out_channels == 2 * channels
    network = fill(lambda: UNet(**config | dict(out_channels=channels, learned_variance=learned)), made)
    size, conditions = _needed(options, "image_size"), ()
    if channels < config["in_channels"]:
        network = SuperResolution(network)
        conditions = (Condition("low_res", (channels, small, small)),)
    fixed = None if options.get("sigma_small") else "fixed_large"
    return dict(
        network=network,
        schedule=_schedule(_needed(options, "noise_schedule"), T),
        prediction="x0" if options.get("predict_xstart") else "eps",
        shape=(channels, size, size),
        variance="learned" if learned else fixed,
        conditions=conditions,
    )


def _published(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a published file. One that is given of the two that set the heads takes the other away."""
    heads = {"num_heads", "num_head_channels"}
    without = heads if heads & given.keys() else set()
    return {flag: value for flag, value in PUBLISHED.get(name, {}).items() if flag not in without}


def _heads(options: Mapping[str, Any]) -> dict[str, int]:
    if options.get("num_head_channels", -1) != -1:
        return {"head_dim": options["num_head_channels"]}
    if "num_heads" not in options:
        raise ValueError("num_heads: expected it or num_head_channels as an option, which no tensor shows, got neither")
    return {"heads": options["num_heads"]}


def _needed(options: Mapping[str, Any], name: str) -> Any:
    if name not in options:
        raise ValueError(f"{name}: expected it as an option, which no tensor shows ({OPTIONS[name]}), got none")
    return options[name]


def _schedule(name: str, T: int) -> Schedule:
    if name == "linear":
        return Schedule.linear(T, 0.1 / T, 20 / T)
    if name != "cosine":
        raise ValueError(f"noise_schedule: expected 'linear' or 'cosine', got {name!r}")
    return Schedule.cosine(T)
