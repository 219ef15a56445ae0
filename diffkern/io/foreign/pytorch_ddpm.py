"""w86763777/pytorch-ddpm: Ho et al. 2020 for CIFAR-10, whose U-Net is ours under other names."""

from collections.abc import Mapping
from typing import Any

import torch

from ...networks import UNet
from ...schedule import Schedule
from .weights import Option, Weights, fill, unet_options, unet_places, unet_weights

NAME = "w86763777/pytorch-ddpm"
ANCHOR = "time_embedding.timembedding.0.weight"
OPTIONS = {
    "beta_1": Option(float, "the first beta (1e-4)"),
    "beta_T": Option(float, "the last beta (0.02)"),
    "mean_type": Option(str, "'epsilon', 'xstart' or 'xprev' ('epsilon')"),
    "var_type": Option(str, "'fixedlarge' or 'fixedsmall' ('fixedlarge')"),
    "img_size": Option(int, "of a file without its x_T, which shows it"),
}
PREDICTIONS = {"epsilon": "eps", "xstart": "x0", "xprev": "mu"}
VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}

PARTS = (
    ("", ""),
    ("norm1", "block1.0"),
    ("conv1", "block1.2"),
    ("time_emb_proj", "temb_proj.1"),
    ("norm2", "block2.0"),
    ("conv2", "block2.3"),
    ("conv_shortcut", "shortcut"),
    ("group_norm", "group_norm"),
    ("to_q", "proj_q"),
    ("to_k", "proj_k"),
    ("to_v", "proj_v"),
    ("to_out.0", "proj"),
    ("conv", "main"),
)
OTHERS = {
    "conv_in": "head",
    "time_embedding.linear_1": "time_embedding.timembedding.1",
    "time_embedding.linear_2": "time_embedding.timembedding.3",
    "mid_block.resnets.0": "middleblocks.0",
    "mid_block.attentions.0": "middleblocks.0.attn",
    "mid_block.resnets.1": "middleblocks.1",
    "conv_norm_out": "tail.0",
    "conv_out": "tail.2",
}


def read(weights: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``Model``. Its sampler clips nothing but the last image."""
    downs = [i for i in range(weights.count("downblocks")) if weights.has(f"downblocks.{i}.main")]
    levels = len(downs) + 1
    blocks = downs[0] if downs else weights.count("downblocks")

    def side(way: str, level: int, j: int) -> tuple[str, str]:
        place = f"{way}blocks.{level * (blocks + 1 + (way == 'up')) + j}"
        return place, f"{place}.attn"

    places = unet_places(levels, blocks, side, OTHERS)
    made = unet_weights(weights, places, PARTS, ignore=(ANCHOR,))
    T, channels = weights.tensors[ANCHOR].shape
    made["time_embedding.linear_1.weight"] = _sines_first(made["time_embedding.linear_1.weight"])
    config = unet_options(made, levels, blocks) | dict(
        norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=False, freq_shift=0.0
    )
    size = _size(weights, options)
    beta_1, beta_T = options.get("beta_1", 1e-4), options.get("beta_T", 0.02)
    mean_type, var_type = options.get("mean_type", "epsilon"), options.get("var_type", "fixedlarge")
    for name, value, known in (("mean_type", mean_type, PREDICTIONS), ("var_type", var_type, VARIANCES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return dict(
        network=fill(lambda: UNet(**config), made),
        schedule=Schedule.linear(T, beta_1, beta_T),
        prediction=PREDICTIONS[mean_type],
        shape=(config["in_channels"], *size),
        variance=VARIANCES[var_type],
        clip=False,
    )


def _sines_first(weight: torch.Tensor) -> torch.Tensor:
    """The layer behind (sin, cos, sin, cos, ...) as the one behind (sin, sin, ..., cos, cos, ...)."""
    return torch.cat((weight[:, 0::2], weight[:, 1::2]), dim=1)


def _size(weights: Weights, options: Mapping[str, Any]) -> tuple[int, int]:
    x_T = weights.all.get("x_T")
    if "img_size" in options:
        return (options["img_size"],) * 2
    if x_T is None:
        raise ValueError("img_size: expected the images' size as an option, for the file has no x_T, got none")
    return tuple(x_T.shape[2:])
